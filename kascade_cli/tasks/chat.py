"""A user's text as token ids, with or without the chat template."""

from collections.abc import Sequence
from typing import Any

from kascade_cli.errors import UsageError
from kascade_cli.tasks.encoding import encode_text


def encode_turns(tokenizer: Any, messages: Sequence[dict[str, Any]], *, ask: bool) -> list[int]:
    """Token ids of chat messages (`role`, `content`) in the tokenizer's template; `ask` opens the model's turn."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    # The template writes the BOS token where the model wants one: adding special tokens would double it.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_request(tokenizer: Any, text: str, *, chat: bool, place: str = "the prompt") -> list[int]:
    """Token ids of a text to be continued, with the BOS token once at most; `chat` wraps it in one user turn.

    Raises UsageError for an empty text or a tokenizer without a template.
    """
    if not text.strip():
        raise UsageError(f"{place} is empty")
    if not chat:
        return encode_text(tokenizer, text)
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("this tokenizer has no chat template: leave --chat out")
    return encode_turns(tokenizer, [{"role": "user", "content": text}], ask=True)
