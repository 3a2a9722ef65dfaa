"""GGUF files: the same model as the checkpoint that they were made from, and what is refused."""

import json
import random
import shutil
import struct
import sys

import pytest
import torch
import transformers as tf
import yaml

from kascade_cli.app import main
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.models import check_revision, describe, fingerprint, load_config, load_model
from kascade_cli.models.gguf_file import read_header

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from tests.gguf_files import TEMPLATE, llama3_factors, write_gguf  # noqa: E402

CLASSES = {
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, {}),
    "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, {}),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {"head_dim": 32}),
}


def tiny(kind, tokenizer, **options):
    """A random model whose rows are whole blocks of Q8_0; rotary halves matter (sharp attention)."""
    config, model, extra = CLASSES[kind]
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    sizes |= {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}, "rms_norm_eps": 1e-5}
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    made = model(config(**sizes | tokens | extra | options)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(std=0.3) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
            if "embed" in name:
                parameter.mul_(3)
    return made


@pytest.fixture(scope="module")
def llama(byte_tokenizer):
    return tiny("llama", byte_tokenizer)


@pytest.fixture
def file(tmp_path, llama, byte_tokenizer):
    return write_gguf(tmp_path / "tiny.gguf", llama, byte_tokenizer)


def logits(model, length=40):
    ids = torch.randint(3, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", CLASSES)
def test_it_is_the_checkpoint_that_it_was_made_from(kind, tied, tmp_path, byte_tokenizer, capfd):
    """Logits, tokenizer, fingerprint: a profile of the checkpoint attaches to the file, and back."""
    source = tiny(kind, byte_tokenizer, tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "m.gguf", source, byte_tokenizer)
    model, tokenizer = load_model(str(path), device="cpu")
    assert model.dtype == torch.float32
    torch.testing.assert_close(logits(model), logits(source), atol=1e-5, rtol=1e-5)
    assert fingerprint(model) == fingerprint(source)
    text = "k1 v2 then\n  k3, 12.5 <s>x</s>"
    assert tokenizer(text).input_ids == byte_tokenizer(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.chat_template, tokenizer.eos_token, tokenizer.bos_token) == (TEMPLATE, "</s>", "<s>")
    assert model.generation_config.eos_token_id == byte_tokenizer.eos_token_id
    info = describe(model)
    assert (info.name, info.layers, info.kv_heads, info.max_positions) == (str(path), 3, 2, 512)
    assert load_config(str(path)).vocab_size == len(byte_tokenizer)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_quantised_weights_are_dequantised(tmp_path, byte_tokenizer):
    source = tiny("qwen2", byte_tokenizer)
    path = write_gguf(
        tmp_path / "m.gguf", source, byte_tokenizer, kind="Q8_0", file_type=gguf.LlamaFileType.MOSTLY_Q8_0
    )
    said = []
    model, _ = load_model(str(path), device="cpu", notify=said.append)
    weights = dict(model.named_parameters())
    checked = 0
    for name, parameter in source.named_parameters():
        array = parameter.detach().numpy()
        if array.ndim > 1:
            blocks = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            array = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
            checked += 1
        assert torch.equal(weights[name], torch.from_numpy(array)), name
    assert checked == 3 * 7 + 2
    megabytes = sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6
    assert said[1:] == [f"{path}: float32, weights: {megabytes:.1f} MB on cpu, dequantised from Q8_0"]
    assert said[0].startswith(f"{path}: dequantising 0.") or said[0].endswith("of Q8_0 weights to float32")

    mark = fingerprint(model)
    assert fingerprint(load_model(str(path), device="cpu")[0]) == mark
    assert fingerprint(load_model(str(path), device="cpu", dtype="bfloat16")[0]) == mark
    other = write_gguf(tmp_path / "n.gguf", source, byte_tokenizer, kind="Q4_0")
    assert fingerprint(load_model(str(other), device="cpu")[0]) != mark
    assert read_header(other, "n").quantization == "Q4_0"  # the file does not say what it calls itself


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_files_keep_their_type(kind, tmp_path, byte_tokenizer):
    source = tiny("qwen2", byte_tokenizer)
    path = write_gguf(tmp_path / "m.gguf", source, byte_tokenizer, kind=kind)
    said = []
    model, _ = load_model(str(path), device="cpu", notify=said.append)
    assert model.dtype == getattr(torch, kind)
    assert len(said) == 1
    assert said[0].endswith("MB on cpu")
    expected = source.get_parameter("model.layers.1.self_attn.q_proj.weight").to(model.dtype)
    assert torch.equal(model.get_parameter("model.layers.1.self_attn.q_proj.weight"), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path, byte_tokenizer):
    """bfloat16 there, under the fingerprint that float32 has on a CPU; a device map gives the same."""
    path = write_gguf(tmp_path / "m.gguf", tiny("llama", byte_tokenizer), byte_tokenizer, kind="Q4_0")
    said = []
    model, _ = load_model(str(path), device="cuda", notify=said.append)
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cuda")
    assert said[-1].endswith("MB on cuda:0, dequantised from Q4_0")
    mark = fingerprint(load_model(str(path), device="cpu")[0])
    assert fingerprint(model) == mark
    placed, _ = load_model(str(path), device_map="auto")
    assert (placed.dtype, fingerprint(placed)) == (torch.bfloat16, mark)


def test_accelerate_places_its_layers(file, llama):
    model, _ = load_model(str(file), device_map="auto", dtype="float32")
    assert fingerprint(model) == fingerprint(llama)


@pytest.mark.parametrize(("factor", "length"), [(8.0, 8192), (32.0, 8192), (4.0, 4096)])
def test_llama3_scaling_is_restored_from_its_factors(factor, length, tmp_path, byte_tokenizer):
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": length,
    }  # fmt: skip
    source = tiny("llama", byte_tokenizer, rope_parameters=rope, num_attention_heads=2, num_key_value_heads=1)
    factors = llama3_factors(32, 500000.0, factor, length)
    assert len(set(factors)) == 3  # one of them between the two ends

    def add(arrays):
        arrays["rope_freqs.weight"] = factors

    model, _ = load_model(str(write_gguf(tmp_path / "m.gguf", source, byte_tokenizer, tensors=add)), device="cpu")
    assert model.config.rope_parameters == rope
    torch.testing.assert_close(logits(model, 500), logits(source, 500), atol=1e-5, rtol=1e-5)
    assert fingerprint(model) == fingerprint(source)

    def spoil(arrays):
        arrays["rope_freqs.weight"] = factors[::-1].copy()

    with pytest.raises(KascadeError, match="factors of its own"):
        load_config(str(write_gguf(tmp_path / "n.gguf", source, byte_tokenizer, tensors=spoil)))


def test_yarn_and_linear_scaling(tmp_path, byte_tokenizer):
    def yarn(writer, arch):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)

    def linear(writer, arch):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.5)

    def longrope(writer, arch):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)

    base = {"rope_theta": 50000.0}
    for change, rope in (
        (yarn, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128} | base),
        (linear, {"rope_type": "linear", "factor": 2.5} | base),
    ):
        source = tiny("qwen2", byte_tokenizer, rope_parameters=rope)
        path = write_gguf(tmp_path / f"{rope['rope_type']}.gguf", source, byte_tokenizer, change=change)
        model, _ = load_model(str(path), device="cpu")
        assert model.config.rope_parameters == rope
        torch.testing.assert_close(logits(model, 300), logits(source, 300), atol=1e-5, rtol=1e-5)
    with pytest.raises(KascadeError, match=r"scaled \(longrope\)"):
        load_config(str(write_gguf(tmp_path / "long.gguf", source, byte_tokenizer, change=longrope)))


def test_folders_that_hold_one(file, llama, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(file, folder / "model.gguf")
    (folder / "mmproj-model.gguf").write_bytes(b"not looked at")
    assert load_config(str(folder)).num_hidden_layers == 3
    model, _ = load_model(str(folder), device="cpu")
    assert describe(model).name == str(folder)
    with pytest.raises(UsageError, match="is a local file, and --revision"):
        check_revision(str(file), "main")

    (folder / "config.json").write_text("{}")  # as some repositories of GGUF files have it
    assert load_config(str(folder)).num_hidden_layers == 3
    llama.save_pretrained(folder)  # a saved model: its own weights count
    assert load_config(str(folder)).architectures == ["LlamaForCausalLM"]

    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    shutil.copy(file, folder / "b.gguf")
    with pytest.raises(KascadeError, match=r"holds several models \(b\.gguf, model\.gguf\); name the one file"):
        load_model(str(folder), device="cpu")


def test_files_that_are_not_there_or_in_parts(file, tmp_path):
    with pytest.raises(KascadeError, match=r"no\.gguf: no such file"):
        load_config(str(tmp_path / "no.gguf"))
    with pytest.raises(KascadeError, match="download the file and name it"):
        load_config("org/repo/model-q4_k_m.gguf")
    (tmp_path / "x.gguf").mkdir()
    with pytest.raises(KascadeError, match="a folder; name the .gguf file"):
        load_config(str(tmp_path / "x.gguf"))
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in (1, 2):
        shutil.copy(file, folder / f"m-0000{part}-of-00002.gguf")
    for name in (folder, folder / "m-00001-of-00002.gguf"):
        with pytest.raises(KascadeError, match="part of a split GGUF.*join"):
            load_config(str(name))


def test_one_of_several_parts_is_known_by_its_header(tmp_path, llama, byte_tokenizer):
    def split(writer, arch):
        writer.add_uint16("split.count", 3)

    with pytest.raises(KascadeError, match="one of 3 parts"):
        load_config(str(write_gguf(tmp_path / "m.gguf", llama, byte_tokenizer, change=split)))


def refused(path):
    """The one line that the header is refused with, None if it is not."""
    try:
        read_header(path, "m")
    except KascadeError as error:
        line = str(error)
    else:
        return None
    assert line.startswith("m: ")
    assert "\n" not in line
    return line


def test_damaged_files(file, tmp_path):
    data = file.read_bytes()
    bad = tmp_path / "bad.gguf"
    for content, message in (
        (b"", "empty"),
        (b"<!doctype html>", "not a GGUF file"),
        (b"GGUF" + struct.pack(">I", 3) + data[8:], "of the other byte order"),
        (b"GGUF" + struct.pack("<I", 1) + data[8:], "version 1"),
        (b"GGUF" + struct.pack("<IQ", 3, 2**60) + data[16:], "header is damaged"),
        (data[:-1000], "cut off: "),
        (data[:3000], "header is damaged or cut off"),
    ):
        bad.write_bytes(content)
        assert message in refused(bad)
        with pytest.raises(KascadeError, match=message):
            load_model(str(bad), device="cpu")
    assert refused(file) is None
    for cut in range(0, len(data), 997):
        bad.write_bytes(data[:cut])
        assert refused(bad)


def test_flipped_bytes_end_in_one_line_or_a_header(file, tmp_path):
    """Whatever stands in the header, reading it takes no memory to speak of and raises nothing else."""
    data, bad = file.read_bytes(), tmp_path / "bad.gguf"
    start = min(tensor.start for tensor in read_header(file, "m").tensors)
    chance, found = random.Random(0), 0
    for _ in range(150):
        spoiled = bytearray(data)
        for _ in range(3):
            spoiled[chance.randrange(start)] = chance.randrange(256)
        bad.write_bytes(spoiled)
        found += refused(bad) is not None
    assert found > 5


def test_architectures_that_transformers_lacks(tmp_path, llama, byte_tokenizer):
    path = write_gguf(tmp_path / "m.gguf", llama, byte_tokenizer)
    # The same length, so that the rest of the file stays in place.
    path.write_bytes(path.read_bytes().replace(b"llama", b"lambo"))
    with pytest.raises(KascadeError) as error:
        load_model(str(path), device="cpu")
    assert str(error.value) == (
        f"{path}: a GGUF of architecture 'lambo', which transformers {tf.__version__} cannot read"
    )


def test_files_that_would_load_as_another_model(tmp_path, llama, byte_tokenizer):
    def experts(writer, arch):
        writer.add_expert_count(8)

    def bias(arrays):
        arrays["blk.0.attn_q.bias"] = arrays["blk.0.attn_norm.weight"].copy()

    def lose(arrays):
        del arrays["blk.1.attn_q.weight"]

    path = tmp_path / "m.gguf"
    for options, message in (
        ({"change": experts}, "mixture of experts"),
        ({"tensors": bias}, "the file holds [0-9,]+ weights, but a LlamaForCausalLM has [0-9,]+"),
        ({"tensors": lose}, "the file holds"),
    ):
        write_gguf(path, llama, byte_tokenizer, **options)
        with pytest.raises(KascadeError, match=message):
            load_model(str(path), device="cpu")
    write_gguf(path, llama, byte_tokenizer)
    path.write_bytes(path.read_bytes().replace(b"llama.attention.head_count\x04", b"llama.attention.head_counx\x04"))
    with pytest.raises(KascadeError, match=r"lacks llama\.attention\.head_count;"):
        load_model(str(path), device="cpu")


def test_every_command_takes_one(tmp_path, byte_tokenizer, capsys):
    """Captured, profiled, run and scored under a name that means something on another machine."""
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    model = tiny("llama", byte_tokenizer)
    write_gguf(folder / "model.gguf", model, byte_tokenizer, kind="Q8_0", file_type=gguf.LlamaFileType.MOSTLY_Q8_0)
    texts = tmp_path / "texts.jsonl"
    rows = [
        json.dumps({"text": " ".join(f"k{(index * step) % 50} v{index}" for index in range(60))}) for step in (3, 7)
    ]
    texts.write_text("\n".join(rows))
    capture, profile = tmp_path / "c.h5", tmp_path / "p.yaml"

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert not stop.value.code, captured.err
        return captured

    shared = ("--device", "cpu")
    run("profile", folder, "-o", capture, "--dev-set", texts, "--max-length", 160, "--num-prompts", 2, *shared)
    run("select-anchors", capture, "-o", profile, "--max-anchors", 2, "--ratio", 0.3, "--min-keys", 16)
    document = yaml.safe_load(profile.read_text())
    assert document["model"]["name"] == "tiny-model"
    assert document["model"]["fingerprint"] == fingerprint(load_model(str(folder), device="cpu")[0])
    asked = ("--prompt", "k1 v2 k3 v4 " * 12, "--profile", profile, "--max-new-tokens", 4, "--compare", "dense")
    for name in (folder, folder / "model.gguf"):
        captured = run("generate", name, *asked, "--json", *shared)
        assert json.loads(captured.out)
        assert "MB on cpu, dequantised from Q8_0" in captured.err
    rows = tmp_path / "task.jsonl"
    rows.write_text(json.dumps({"prompt": "k1 v2 k3 v4 " * 12, "answer": "k1"}))
    asked = ("--task", rows, "--strategies", "dense,kascade", "--profile", profile)
    captured = run("evaluate", folder, *asked, "--json", *shared)
    assert "kascade" in captured.out


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_what_is_missing_is_named(package, file, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(KascadeError) as error:
        load_model(str(file), device="cpu")
    assert str(error.value) == f"{package} is not installed: pip install 'kascade-cli[gguf]'"
