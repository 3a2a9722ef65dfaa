"""No command replaces a file that it is made from, whatever it is told to overwrite."""

import pytest

from kascade_cli.app import main
from kascade_cli.files import check_output


@pytest.mark.parametrize(
    "arguments",
    [
        "select-anchors capture.h5 --no-verify -o capture.h5 --overwrite",
        "select-anchors capture.h5 --no-verify -o link --overwrite",
        "select-anchors other.h5 --verify-dev-set texts.jsonl -o texts.jsonl --overwrite",
        "evaluate demo-small --profile profile.yaml --plot profile.yaml --overwrite",
        "evaluate demo-small --task pairs,texts.jsonl --plot texts.jsonl --overwrite",
        "export profile.yaml -o ./profile.yaml --overwrite",
        "import M_layers_0_2.npy --model demo-small -o M_layers_0_2.npy --overwrite",
        "profile demo-small --dev-set texts.jsonl -o texts.jsonl --overwrite",
        "profile demo-small --haystack texts.jsonl -o texts.jsonl --overwrite",
        "report profile.yaml -o profile.yaml --overwrite",
    ],
)
def test_an_output_is_none_of_the_inputs(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ("capture.h5", "other.h5", "profile.yaml", "texts.jsonl", "M_layers_0_2.npy")
    for name in names:
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to("capture.h5")
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert "would replace a file that it is made from: name another output" in err
    assert err.count("\n") == 1
    assert all((tmp_path / name).read_text() == name for name in names)


def test_inputs_that_are_no_files_are_in_nobodys_way(tmp_path):
    (tmp_path / "out").touch()
    inputs = [None, "", "org/model", "x" * 5000, "nul\0", tmp_path, tmp_path / "missing"]
    assert check_output(tmp_path / "out", True, inputs) == tmp_path / "out"
    assert check_output(tmp_path / "new", False, [tmp_path / "new"]) == tmp_path / "new"


def test_a_figure_is_a_png(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "demo-small", "--strategies", "dense", "--plot", str(tmp_path / "x.svg")])
    assert stop.value.code == 2
    assert "name a file that ends in .png" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
