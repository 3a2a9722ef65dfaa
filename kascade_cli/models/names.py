"""What a model's name means on this machine."""

from pathlib import Path

from kascade_cli.errors import UsageError


def resolve_name(name: str) -> str:
    """`demo` and `demo-small` are the models shipped with the package; anything else is a path or a hub id."""
    from kascade_cli.demo import DEMO_MODELS

    return str(DEMO_MODELS.get(name, name))


def check_revision(name: str, revision: str | None) -> None:
    """Raises UsageError for a revision of a model that does not come from the hub."""
    from kascade_cli.demo import DEMO_MODELS

    if revision is None:
        return
    if name in DEMO_MODELS:
        raise UsageError(f"{name} is shipped with the package and has no revisions: leave --revision out")
    if (path := Path(name)).exists():
        kind = "folder" if path.is_dir() else "file"
        raise UsageError(f"{name} is a local {kind}, and --revision chooses a version on the hub: leave it out")
