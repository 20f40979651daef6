"""A person with a browser in front of a Flower; it prints what they saw as JSON.

``python -m tests.browse ADDRESS PASSWORD-FILE FOLDER TASK...`` waits for each of these tasks, reads all pages as
somebody without a password, with a wrong one and with the right one, and keeps pictures in the folder. It runs in an
environment of its own, with Debian's Chromium.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Error, Page, sync_playwright

PAGES = ("/", "/tasks", "/workers", "/metrics", "/api/workers", "/api/tasks", "/static/js/flower.js")
WRITES = ("/api/task/send-task/x", "/api/task/revoke/x", "/api/worker/shutdown/x", "/api/worker/pool/grow/x", "/broker")
#: A script that somebody got into the page, and what it did.
INJECT = """() => { const script = document.createElement("script"); script.textContent = "window.injected = true";
document.body.append(script); return window.injected === true }"""
SOCKET = """address => new Promise(done => { const socket = new WebSocket(address.replace("http", "ws"));
socket.onopen = () => done(true); socket.onerror = () => done(false) })"""
POST = "path => fetch(path, {method: 'POST'}).then(answer => answer.status)"


def status(page: Page, address: str) -> int:
    """Ask for a page and return what it answers; the browser gives up at a login that it has no password for."""
    try:
        answer = page.goto(address)
    except Error as error:
        if "ERR_INVALID_AUTH_CREDENTIALS" in str(error):
            return 401
        raise
    return int(answer.status) if answer else 0


def statuses(page: Page, address: str) -> dict[str, int]:
    """Return what each page answers."""
    return {path: status(page, address + path) for path in PAGES}


def opened(browser: Browser, password: str | None, noise: list[str]) -> Page:
    """Open a window; its complaints are added to the noise."""
    login: Any = {"username": "anybody", "password": password} if password is not None else None
    page = browser.new_context(ignore_https_errors=True, http_credentials=login).new_page()
    page.on("console", lambda message: noise.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: noise.append(f"error: {error}"))
    return page


def framed(page: Page, address: str) -> bool:
    """Whether another site may show Flower within its own page."""
    page.set_content(f'<iframe src="{address}/tasks" width="900" height="500"></iframe>')
    page.frames[-1].wait_for_load_state()
    return str(page.frames[-1].url).startswith(address)


def shown(page: Page, address: str, task: str) -> str:
    """Wait until a task is in the table, and return the text of its row."""
    page.goto(f"{address}/tasks")
    row = page.locator(f'[id="{task}"]')
    for _ in range(30):
        if row.count():
            break
        page.wait_for_timeout(1000)
        page.reload()
        page.wait_for_load_state("networkidle")
    return str(row.inner_text())


def logged_in(page: Page, address: str, folder: Path, tasks: list[str]) -> dict[str, Any]:
    """Look at everything; the pictures are named after the pages."""
    seen: dict[str, Any] = {"rows": {task: shown(page, address, task) for task in tasks}}
    page.screenshot(path=folder / "tasks.png")
    seen["task table"] = page.locator("#tasks-table tbody").inner_text()
    markup = page.locator("#tasks-table tbody").evaluate("table => table.querySelectorAll('b, img, script').length")
    seen["buttons"] = {}
    for name, path in {"task": f"/task/{tasks[-1]}", "workers": "/", "worker": ""}.items():
        if not path:
            path = f"/worker/{page.locator('#workers-table tbody tr a').first.get_attribute('aria-label')}"
            path = path.replace("Worker ", "")
        page.goto(address + path)
        page.wait_for_load_state("load")
        if name == "workers":
            page.wait_for_selector("#workers-table tbody tr a")
        page.screenshot(path=folder / f"{name}.png")
        seen[name] = page.locator("main").inner_text()
        markup += page.locator("main").evaluate("main => main.querySelectorAll('b, img, script').length")
        seen["buttons"][name] = page.locator("main button.btn-danger, main button.btn-primary, main form").count()
    seen["markup"] = markup
    seen["ran"] = page.evaluate("window.planted === true")
    return seen


def main() -> None:
    """Print what was seen."""
    address, password_file, folder, *tasks = sys.argv[1:]
    password = Path(password_file).read_text(encoding="utf-8")
    noise: list[str] = []
    Path(folder).mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=arguments)
        stranger = opened(browser, None, [])
        seen: dict[str, Any] = {"stranger": statuses(stranger, address)}
        stranger = opened(browser, None, [])
        seen["stranger's socket"] = stranger.evaluate(SOCKET, f"{address}/api/task/events")
        seen["stranger's posts"] = {path: stranger.request.post(address + path).status for path in WRITES}
        page = opened(browser, password, noise)
        if tasks:
            seen |= logged_in(page, address, Path(folder), tasks)
        seen["noise"] = list(noise)
        seen["person"] = statuses(page, address)
        page.goto(address)
        seen["posts"] = {path: page.evaluate(POST, path) for path in WRITES}
        seen["socket"] = page.evaluate(SOCKET, f"{address}/api/task/events")
        seen["injected"] = page.evaluate(INJECT)
        seen["framed"] = framed(opened(browser, password, []), address)
        guesser = opened(browser, "wrong", [])
        seen["guesses"] = [status(guesser, address) for _ in range(7)]
        seen["after guesses"] = status(page, address)
        browser.close()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
