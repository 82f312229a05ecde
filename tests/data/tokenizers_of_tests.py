"""Tokenizers of the kinds that users have, trained on a little text."""

import functools
import random
import sysconfig
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

END_TOKEN = "<|endoftext|>"
SPECIAL = ["<unk>", END_TOKEN, "<s>"]
KINDS = (
    "byte-level",
    "byte-level-trimmed",
    "byte-level-llama3",
    "metaspace-always",
    "metaspace-first",
    "metaspace-unsplit",
    "replaced",
    "unigram",
    "nfkc",
)


def mixed_text(seed: int, length: int) -> str:
    """Code, prose, digits, emoji, CJK, accents of several code points, and long runs of one character."""
    rng = random.Random(seed)
    code = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text()
    parts: list[str] = []
    size = 0
    while size < length:
        at = rng.randrange(len(code) - 600)
        part = rng.choice(
            [
                code[at : at + rng.randrange(600)],
                code[at : at + rng.randrange(600)],
                " ".join("".join(rng.choices("etaoinshrdlu", k=rng.randrange(1, 9))) for _ in range(40)),
                rng.choice(" \n\t0_=") * rng.choice([1, 2, 3, 70, 900]),
                rng.choice(["\n \n", "  \n", "\r\n", " \u3000", "\xa0"]) * rng.choice([1, 40]),
                "".join(rng.choices("0123456789", k=rng.randrange(1, 500))),
                "".join(rng.choices("😀👩‍👩‍👧é ✓ﬁ①ᾳ", k=60)),
                "".join(rng.choices("日本語の文章。一二三", k=rng.randrange(300))),
                "e\u0301o\u0308\u0323 " * rng.randrange(20),
                "it's we'll I'M <s> <|endoftext|>",
            ]
        )
        parts.append(part)
        size += len(part)
    return "".join(parts)


@functools.cache
def trained(kind: str) -> Tokenizer:
    """A tokenizer of one of KINDS."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    byte_level = kind.startswith("byte-level") or kind == "nfkc"
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=600, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    elif byte_level:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.decoder = decoders.ByteLevel()
        if kind == "byte-level-llama3":
            # Digits in threes: where a group begins depends on where the run of digits does.
            split = Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+"
            )
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(split, "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "byte-level-trimmed")
        if kind == "byte-level-trimmed":
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        if kind == "nfkc":
            tokenizer.normalizer = normalizers.NFKC()
        trainer = trainers.BpeTrainer(
            vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        if kind == "replaced":  # as Llama 2 does: the whole text is one word
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            scheme = "first" if kind == "metaspace-first" else "always"
            split = kind != "metaspace-unsplit"
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=[*SPECIAL, *fallback], show_progress=False)
    text = [mixed_text(seed, 1500) for seed in range(100, 130)]
    if kind in ("replaced", "metaspace-unsplit"):  # words, which the training would not find otherwise
        text = [word for one in text for word in one.replace(" ", " ▁").split(" ") if len(word) < 20]
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def save(kind: str, path: Path) -> Path:
    """Write tokenizer.json."""
    trained(kind).save(str(path))
    return path
