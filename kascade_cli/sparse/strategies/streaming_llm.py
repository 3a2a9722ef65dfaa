"""StreamingLLM (arXiv 2309.17453): sinks and a sliding window."""

import torch
from torch import Tensor

from kascade_cli.sparse.layer import Keys, Layer
from kascade_cli.sparse.state import Pass
from kascade_cli.sparse.strategy import Option, Strategy, whole_number


class StreamingLLM(Strategy):
    """The first `sinks` keys and the most recent ones, as many as the budget in all, through the same sparse ops.

    The paper's tables give it 30 % of the keys: `streaming-llm:ratio=0.3`.
    """

    name, summary, rank = (
        "streaming-llm",
        "sink tokens and the most recent keys, as many as the budget, in every layer",
        20,
    )
    options = {"sinks": Option(whole_number(0), 4, "first tokens that are always read")}

    def begin(self, state: Pass) -> None:
        batch = state.batch
        end = batch.lengths.kv_len if batch.phase == "decode" else batch.before
        start = batch.lengths.kv_start if batch.phase == "decode" else batch.lengths.kv_start[:, None]
        order = torch.arange(batch.width, dtype=torch.int32, device=end.device)
        counts = batch.counts[..., None]
        # The first entries are the row's first tokens; the window ends at the last key.
        token = torch.where(order < counts.clamp(max=self.sinks), order, end[..., None] - counts + order)
        state.notes["window"] = Keys(
            torch.where(order < counts, token + start[..., None], -1).unsqueeze(1), batch.counts
        )

    def attend(self, layer: Layer) -> Tensor:
        return layer.attend(layer.state.notes["window"].to(layer.query.device))

    def role(self, layer: int) -> str:
        return "window"
