import pytest

from kascade_cli.app import main
from kascade_cli.models import describe, load_model
from tests.integrations.transformers.naive import some_profile
from tests.toy_captures import toy


@pytest.fixture
def run_kascade(capsys):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def small():
    """The 8-layer demo model and its tokenizer."""
    return load_model("demo-small", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def profile(small, tmp_path_factory):
    """A file with a profile of it: four anchors, a tenth of the keys."""
    path = tmp_path_factory.mktemp("profile") / "p.yaml"
    some_profile(describe(small[0], "demo-small"), anchors=[0, 1, 2, 7], ratio=0.1, min_keys=16).save(path)
    return path


@pytest.fixture
def select(run_kascade, tmp_path):
    """Runs select-anchors on a toy capture: (exit code, stdout, stderr, profile path)."""

    def run(*options, capture=None, output="profile.yaml"):
        path = capture or toy(tmp_path / "capture.h5")
        target = tmp_path / output
        return *run_kascade(
            "select-anchors", path, "-o", target, "--top-k", "9", "--bootstrap", "20", *options
        ), target

    return run
