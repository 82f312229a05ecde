"""The command `dash-dist generate`: text that an exported model writes after a prompt, as it comes.

Knows tokenizers and terminals; does not know the attention.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, TextStreamer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from dash_dist.data.tokenizer import ByteTokenizer
from dash_dist.errors import ConfigError, RunError
from dash_dist.hf.registration import load

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def generate(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    routing_scale: float | None,
    write: Callable[[str], Any],
) -> None:
    """Continue `prompt` by the model in `folder`; `write` gets the new text in pieces.

    A folder without tokenizer files is a model of bytes. An empty prompt stands for the start of a document.

    Args:
        temperature: 0 takes the likeliest token every time.
        routing_scale: None for the trained one.

    Raises ConfigError for a folder or a length that cannot work, RunError for weights that cannot be loaded.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder / 'config.json'} is missing: name a folder that `dash-dist export` wrote")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = load(folder, routing_scale=routing_scale, dtype="auto")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunError(f"{folder} cannot be loaded: {error}") from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ids, end, streamer = _encode(folder, prompt, model.config.vocab_size, write)
    limit = model.config.max_position_embeddings
    if len(ids) + max_new_tokens > limit:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens and --max-new-tokens is {max_new_tokens}, but the model has {limit} "
            f"positions: " + (f"ask for at most {limit - len(ids)}" if len(ids) < limit else "shorten the prompt")
        )
    tokens = torch.tensor([ids], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        eos_token_id=end,
        pad_token_id=0,
        **sampling,
    )


def _encode(folder: Path, prompt: str, vocab_size: int, write: Callable[[str], Any]) -> tuple[list[int], Any, Any]:
    """Token ids of the prompt, the id that ends a document, and a streamer of transformers."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        if vocab_size != ByteTokenizer.vocab_size:
            raise ConfigError(
                f"{folder} has no tokenizer, and {vocab_size} tokens are not the {ByteTokenizer.vocab_size} of a byte "
                "model: copy the run's tokenizer.json and tokenizer_config.json there"
            )

        class ByteStreamer(BaseStreamer):
            """Decodes UTF-8 as it comes, without the prompt and the end of the document."""

            def __init__(self) -> None:
                self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
                self.prompt = True

            def put(self, value: Any) -> None:
                if not self.prompt:
                    write(self.decoder.decode(bytes(token for token in value.flatten().tolist() if token < 256)))
                self.prompt = False

            def end(self) -> None:
                write(self.decoder.decode(b"", final=True))

        end = ByteTokenizer.end_of_document
        return list(prompt.encode("utf-8", "surrogateescape")) or [end], end, ByteStreamer()

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"the tokenizer in {folder} cannot be loaded: {error}") from error

    class Streamer(TextStreamer):
        """Hands on the text of finished words."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    ids = list(tokenizer(prompt)["input_ids"])
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not ids and start is None:
        raise ConfigError("the prompt is empty, and the tokenizer has no token that starts a document: give a prompt")
    ids = ids or [start]
    if max(ids) >= vocab_size:
        raise ConfigError(
            f"the tokenizer in {folder} gave token {max(ids)}, the model has {vocab_size}: they do not belong together"
        )
    return ids, tokenizer.eos_token_id, Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
