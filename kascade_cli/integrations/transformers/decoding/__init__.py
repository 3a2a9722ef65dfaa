"""Decoding on a static cache in CUDA graphs: one loop for `generate`, `evaluate` and `bench e2e`."""

from kascade_cli.integrations.transformers.decoding.decoder import Decoder, decode_behind, decoder_of
from kascade_cli.integrations.transformers.decoding.generate import GraphDecode
from kascade_cli.integrations.transformers.decoding.loop import decode
from kascade_cli.integrations.transformers.decoding.runner import Runner
from kascade_cli.integrations.transformers.decoding.slots import Slots, bucket

__all__ = ["Decoder", "GraphDecode", "Runner", "Slots", "bucket", "decode", "decode_behind", "decoder_of"]
