"""The one place where the tests name the package; everything else imports from here."""

from . import throw_away

with throw_away():
    from {{ cookiecutter.package_name }} import hardening, tasks
    from {{ cookiecutter.package_name }}.hardening import (
        audit,
        canvas,
        claims,
        codec,
        consumer,
        envelope,
        errors,
        explain,
        files,
        gate,
        identity,
        intake,
        intake_redis,
        keys,
        ownership,
        policy,
        producer,
        quarantine,
        render,
        results,
        strict,
        tls,
        topology,
        trust,
    )
    from {{ cookiecutter.package_name }}.settings import Settings
    from {{ cookiecutter.package_name }}.tasks import documents

__all__ = [
    "Settings",
    "audit",
    "canvas",
    "claims",
    "codec",
    "consumer",
    "documents",
    "envelope",
    "errors",
    "explain",
    "files",
    "gate",
    "hardening",
    "identity",
    "intake",
    "intake_redis",
    "keys",
    "ownership",
    "policy",
    "producer",
    "quarantine",
    "render",
    "results",
    "strict",
    "tasks",
    "tls",
    "topology",
    "trust",
]
