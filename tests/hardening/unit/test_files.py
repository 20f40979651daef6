"""Key and certificate files: what is read, and what is refused with a sentence that says what to do."""

from __future__ import annotations

import os
import platform
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from ...project import errors, files

SETTING = "SECURE_CELERY_SECURITY_KEY"
CONTENT = b"-----BEGIN PRIVATE KEY-----"

Write = Callable[..., Path]
Read = Callable[[str, Path], bytes]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file with a mode."""

    def write(mode: int = 0o600, content: bytes = CONTENT, name: str = "key.pem") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        path.chmod(mode)
        return path

    return write


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every opened file is root's, and we are somebody else who cannot write it."""
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        fields = list(real(descriptor))
        fields[stat.ST_UID] = 0
        return os.stat_result(fields)

    monkeypatch.setattr(files.os, "fstat", fstat)
    monkeypatch.setattr(files.os, "access", lambda path, mode: not mode & os.W_OK)


def refused(read: Read, path: Path, code: str, *words: str) -> None:
    with pytest.raises(errors.ConfigurationRefused) as caught:
        read(SETTING, path)
    sentence = str(caught.value)
    assert caught.value.code == code
    assert sentence.startswith(f"{SETTING}: ")
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


def test_a_private_file_of_ours_is_read(write: Write) -> None:
    assert files.read_private_file(SETTING, write(0o600)) == CONTENT
    assert files.read_private_file(SETTING, write(0o400)) == CONTENT


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o444, 0o666])
def test_a_private_file_that_everyone_can_access_is_refused(write: Write, mode: int) -> None:
    path = write(mode)
    refused(files.read_private_file, path, "config.key-permissions", "every user", f"{mode:04o}", f"chmod 600 {path}")


@pytest.mark.parametrize("mode", [0o640, 0o660, 0o610, 0o620])
def test_a_private_file_that_our_group_can_access_is_refused(write: Write, mode: int) -> None:
    refused(files.read_private_file, write(mode), "config.key-permissions", "the group", f"{mode:04o}")


@pytest.mark.usefixtures("handed_over")
def test_a_file_of_roots_that_our_group_may_read_is_read(write: Write) -> None:
    assert files.read_private_file(SETTING, write(0o440)) == CONTENT


@pytest.mark.usefixtures("handed_over")
@pytest.mark.parametrize("mode", [0o460, 0o450, 0o444])
def test_a_file_of_roots_that_allows_more_than_group_read_is_refused(write: Write, mode: int) -> None:
    refused(files.read_private_file, write(mode), "config.key-permissions")


@pytest.mark.usefixtures("handed_over")
def test_a_file_of_roots_that_we_can_write_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "access", lambda path, mode: True)
    refused(files.read_private_file, write(0o440), "config.key-permissions")


def test_a_file_of_somebody_elses_that_our_group_may_read_is_refused(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(0o440)
    fields = list(path.stat())
    fields[stat.ST_UID] = 12345
    monkeypatch.setattr(files.os, "fstat", lambda descriptor: os.stat_result(fields))
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    refused(files.read_private_file, path, "config.key-permissions")


def test_a_systemd_credential_that_its_group_may_read_is_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(path.parent))
    assert files.read_private_file(SETTING, path) == CONTENT


def test_a_systemd_credential_that_everyone_may_read_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(0o444)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(path.parent))
    refused(files.read_private_file, path, "config.key-permissions")


def test_a_link_out_of_the_credentials_directory_gains_nothing(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(0o440)
    folder = path.parent / "credentials"
    folder.mkdir()
    (folder / "key.pem").symlink_to(path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    refused(files.read_private_file, folder / "key.pem", "config.key-permissions")


def test_a_link_is_followed_as_kubernetes_needs_it(write: Write) -> None:
    link = write(0o400).with_name("link.pem")
    link.symlink_to("key.pem")
    assert files.read_private_file(SETTING, link) == CONTENT


def test_a_key_on_a_windows_drive_is_refused_and_the_sentence_says_why(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(0o777)
    monkeypatch.setattr(platform, "release", lambda: "5.15.167.4-microsoft-standard-WSL2")
    monkeypatch.setattr(files.os.path, "realpath", lambda _: "/mnt/c/Users/me/key.pem")
    monkeypatch.setattr(files.Path, "stat", lambda _: os.stat_result([stat.S_IFDIR | 0o777, *[0] * 9]))
    refused(files.read_private_file, path, "config.key-permissions", "Windows drive", "WSL's own file system")


def test_a_windows_drive_is_only_known_under_wsl(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "6.1.0-13-amd64")
    refused(files.read_private_file, write(0o604), "config.key-permissions", "every user of this host")


@pytest.mark.parametrize("read", [files.read_private_file, files.read_public_file])
class TestEveryFile:
    def test_a_relative_path_is_refused(self, read: Read) -> None:
        refused(read, Path("keys/key.pem"), "config.file", "relative path", "absolute")

    def test_a_missing_file_is_refused(self, read: Read, tmp_path: Path) -> None:
        refused(read, tmp_path / "none.pem", "config.file", "does not exist")

    def test_a_folder_is_refused(self, read: Read, tmp_path: Path) -> None:
        refused(read, tmp_path, "config.file", "is not a file")

    def test_a_pipe_is_refused_and_not_waited_for(self, read: Read, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe", 0o600)
        refused(read, tmp_path / "pipe", "config.file", "is not a file")

    def test_an_empty_file_is_refused(self, read: Read, write: Write) -> None:
        refused(read, write(content=b" \n"), "config.file", "is empty")

    def test_an_endless_file_is_refused(self, read: Read, write: Write) -> None:
        refused(read, write(content=b"x" * (files.LARGEST_FILE + 1)), "config.file", "larger than")

    def test_an_unreadable_file_is_refused(self, read: Read, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        def denied(*_: object) -> int:
            raise PermissionError(13, "Permission denied")  # as root, no mode makes a file unreadable

        monkeypatch.setattr(files.os, "open", denied)
        refused(read, write(), "config.file", "cannot be read by user", "Permission denied")

    def test_a_file_in_a_folder_that_everyone_can_write_is_refused(self, read: Read, write: Write) -> None:
        path = write()
        path.parent.chmod(0o777)
        refused(read, path, "config.file", "can replace files in", f"chmod o-w {path.parent}")

    def test_a_link_in_a_folder_that_everyone_can_write_is_refused(self, read: Read, write: Write) -> None:
        path = write()
        folder = path.parent / "open"
        folder.mkdir()
        folder.chmod(0o777)
        (folder / "key.pem").symlink_to(path)
        refused(read, folder / "key.pem", "config.file", "can replace files in")

    def test_a_folder_that_only_owners_can_delete_from_is_accepted(self, read: Read, write: Write) -> None:
        path = write()
        path.parent.chmod(0o1777)
        assert read(SETTING, path) == CONTENT


def test_a_public_file_that_everyone_can_read_is_read(write: Write) -> None:
    assert files.read_public_file(SETTING, write(0o644)) == CONTENT


def test_a_public_file_that_everyone_can_write_is_refused(write: Write) -> None:
    path = write(0o646)
    refused(files.read_public_file, path, "config.file", "can replace", f"chmod o-w {path}")
