"""Writes a transformers model as a GGUF file, the way llama.cpp's converter does."""

import json
import math

import gguf
import numpy as np

TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
KINDS = {"float32": None, "float16": gguf.GGMLQuantizationType.F16, "bfloat16": gguf.GGMLQuantizationType.BF16}


def write_gguf(path, model, tokenizer, *, kind="float32", name="Tiny", file_type=None, change=None, tensors=None):
    """Writes `path`; `kind` is a float type or a block type such as Q8_0 for the matrices.

    `change` is called with the writer and the architecture's name before the tensors; `tensors` with a dict of arrays
    by GGUF name, in place.
    """
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch == "llama":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if arch == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if file_type is not None:
        writer.add_file_type(file_type)
    _write_tokenizer(writer, tokenizer)
    if change is not None:
        change(writer, arch)
    arrays = dict(_arrays(model, arch))
    if tensors is not None:
        tensors(arrays)
    for key, array in arrays.items():
        block = KINDS[kind] if kind in KINDS else gguf.GGMLQuantizationType[kind]
        if block is None or array.ndim == 1:
            writer.add_tensor(key, array)
        else:
            writer.add_tensor(key, gguf.quants.quantize(array, block), raw_dtype=block)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer, tokenizer):
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _arrays(model, arch):
    config = model.config
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for key, tensor in model.state_dict().items():
        if tied and key == "lm_head.weight":
            continue
        array = tensor.float().numpy()
        if arch == "llama" and ("q_proj" in key or "k_proj" in key):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            array = interleaved(array, heads)
        yield names.get_name(key, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(array)


def interleaved(array, heads):
    """Rotary halves beside each other, as GGUF's llama has them."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def llama3_factors(head_dim, theta, factor, length, low=1.0, high=4.0):
    """rope_freqs.weight of a llama3-scaled model, one frequency at a time."""
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)
