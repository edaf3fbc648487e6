"""A SentencePiece `.model` as a `tokenizer.json`, after a check against the sentencepiece library itself.

Everything downstream (fast encoding, run folders, exports) takes a `tokenizer.json`. The usual conversions differ from
SentencePiece where it matters for code: leading, trailing and repeated spaces. So the pieces are laid out here as in the file
that comes with Llama-2, and the result is compared with the library on texts that are meant to be hard. A model that does
something else, such as normalising its text or dropping spaces, is refused rather than approximated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from megatron_plasticity.errors import UserError

_SPACE = "▁"  # how SentencePiece writes a space inside a piece
PROBES = (
    "The quick brown fox, 1234.5.",
    "  two leading spaces,  two inside, and two at the end  ",
    "def f(x):\n    if x:\n        return  x\n\t\ttabs\r\n",
    "naïve façade Ω ﬁ ½ Ａ e\u0301 漢字 한국어 العربية 🙂👩‍👩‍👧",
    " ",
    "▁ and \u00a0 and \u200b",
    "a" * 37 + " " * 21 + "\n" * 9,
    "<s> </s> <unk> <0x0A>",
)


def tokenizer_json_of_sentencepiece(path: Path) -> str:
    """The content of a `tokenizer.json` that encodes as the model in `path` does.

    Raises UserError when the sentencepiece library is not installed, the file is not one of its models, or is one that no
    `tokenizer.json` of this kind can follow.
    """
    reference = _load(path)
    converted = _convert(reference, path)
    for probe in PROBES:
        expected = reference.encode(probe)
        found = converted.encode(probe, add_special_tokens=False).ids
        if found != expected:
            raise UserError(
                f"{path}: a tokenizer.json made of this SentencePiece model encodes {probe!r} as {found[:8]}…, sentencepiece as "
                f"{expected[:8]}…; only byte-pair models with byte fallback and without normalisation (Llama-2, Mistral) can be "
                "converted. Use the model's own tokenizer.json"
            )
    return converted.to_str(pretty=True) + "\n"


def _load(path: Path) -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise UserError(
            f"{path}: reading a SentencePiece model needs the package sentencepiece: pip install 'megatron-plasticity[data]', or "
            "use the tokenizer.json of the same model"
        ) from None
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: not a SentencePiece model: {error}") from error


def _convert(reference: Any, path: Path) -> tokenizers.Tokenizer:
    ids = range(reference.get_piece_size())
    pieces: list[str] = [reference.id_to_piece(i) for i in ids]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces) or not any(reference.is_byte(i) for i in ids):
        raise UserError(
            f"{path}: has no byte pieces (or a piece twice), so it cannot encode every text; only byte-pair models with byte "
            "fallback (Llama-2, Mistral) can be converted. Use the model's own tokenizer.json"
        )
    ordinary = [i for i in ids if not (reference.is_control(i) or reference.is_unknown(i) or reference.is_byte(i))]
    merges = []
    for i in sorted(ordinary, key=lambda i: (-reference.get_score(i), i)):  # a better score is an earlier merge
        piece = pieces[i]
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += sorted(
            (half for half in halves if half[0] in vocabulary and half[1] in vocabulary),
            key=lambda half: (vocabulary[half[0]], vocabulary[half[1]]),
        )
    unknown = pieces[reference.unk_id()]
    converted = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    converted.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    converted.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    converted.add_special_tokens(
        [AddedToken(pieces[i], normalized=False, special=True) for i in ids if reference.is_control(i) or reference.is_unknown(i)]
    )
    converted.encode_special_tokens = True  # as sentencepiece does: such letters in a text are text
    return converted
