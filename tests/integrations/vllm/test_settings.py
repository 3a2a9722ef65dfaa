"""The plugin's two variables: nothing is imported without them, and nothing in them is guessed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.integrations.vllm.errors import Refusal
from kascade_cli.integrations.vllm.settings import OPTIONS, PROFILE, Settings, read_settings

DEMO = Path(__file__).parents[3] / "profiles" / "demo.yaml"


def read(text=None, profile=None):
    return read_settings({OPTIONS: text or "", PROFILE: profile or ""})


def test_inert_without_the_variables():
    code = (
        "import sys, kascade_cli.integrations.vllm as plugin; plugin.register(); "
        "print([name for name in ('torch', 'vllm', 'transformers', 'pydantic', 'yaml') if name in sys.modules])"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KASCADE")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean)
    assert done.stdout.strip() == "[]"


def test_defaults_and_all_keys():
    assert read() == Settings()
    given = {
        "strategy": "oracle", "ratio": 0.2, "min_keys": 64, "tile": 16, "backend": "torch",
        "allow_other_weights": True, "log": 2.5, "report": "out.json", "graphs": "full",
    }  # fmt: skip
    assert read(json.dumps(given), "p.yaml") == Settings(profile="p.yaml", **given)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("[]", "not a JSON object"),
        ('{"strateggy": "dense"}', "no key 'strateggy': it has strategy, ratio"),
        ('{"ratio": 0.1, "ratio": 0.2}', "key 'ratio' twice"),
        ('{"ratio": NaN}', "NaN is no number"),
        ('{"ratio": "0.1"}', 'ratio is "0.1" and must be a number in (0, 1]'),
        ('{"ratio": 0}', "must be a number in (0, 1]"),
        ('{"ratio": 1.5}', "must be a number in (0, 1]"),
        ('{"min_keys": true}', "whole number"),
        ('{"tile": 0}', "whole number"),
        ('{"log": -1}', "seconds, 0 or more"),
        ('{"graphs": "all"}', "auto, piecewise or full"),
        ('{"allow_other_weights": 1}', "true or false"),
        ('{"strategy": "' + "x" * 500 + '\\u001b[31m", "ratio": 2}', "ratio is 2"),
    ],
)
def test_refused(text, says):
    with pytest.raises(UsageError) as error:
        read(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)


def test_the_setting():
    setting = read('{"strategy": "streaming-llm:ratio=0.3:sinks=2", "tile": 64}').setting()
    assert (setting.strategy, setting.ratio, setting.options) == ("streaming-llm", 0.3, {"sinks": "2"})
    assert setting.budget().tile == 64
    setting = read('{"ratio": 0.05}', str(DEMO)).setting()
    assert setting.profile.model.layers == 16
    assert (setting.budget().ratio, setting.budget().min_keys) == (0.05, 16)


@pytest.mark.parametrize(
    ("text", "profile", "says"),
    [
        (None, "no-such-file.yaml", "no-such-file.yaml"),
        (None, str(Path(__file__)), "not a kascade profile|not readable"),
        ('{"strategy": "kascade"}', None, "needs a profile: set KASCADE_PROFILE"),
        ('{"strategy": "kascad"}', str(DEMO), "strategy 'kascad' is not known"),
        ('{"strategy": "oracle:pol=x"}', str(DEMO), "no option 'pol'"),
        ('{"backend": "cuda"}', str(DEMO), "backend 'cuda' is not known"),
        ('{"report": "no-such-folder/out.json"}', str(DEMO), "folder no-such-folder does not exist"),
    ],
)
def test_what_needs_the_rest_of_kascade(text, profile, says):
    with pytest.raises(KascadeError, match=says):
        read(text, profile).setting()


def test_a_refusal_is_one_line_of_a_process_and_an_exception_of_a_program():
    code = "from kascade_cli.integrations.vllm.errors import Refusal; raise Refusal('no\\nprofile')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "kascade: no profile\n")
    assert isinstance(Refusal("x"), KascadeError)
    assert isinstance(Refusal("x"), Exception)


@pytest.mark.parametrize(
    ("text", "device", "whole"),
    [
        (None, "cuda", True),
        (None, "cpu", False),
        ('{"strategy": "dense"}', "cuda", True),
        ('{"strategy": "kascade-pooled"}', "cuda", True),
        ('{"strategy": "streaming-llm:ratio=0.3"}', "cuda", False),
        ('{"strategy": "quest"}', "cuda", False),
        ('{"strategy": "quest", "graphs": "full"}', "cuda", True),
        ('{"graphs": "full"}', "cpu", True),
        ('{"graphs": "piecewise"}', "cuda", False),
    ],
)
def test_what_cuda_graphs_hold(text, device, whole):
    assert read(text).whole_steps(device) is whole
