"""Whether two models mean the same tokens by the same ids."""

from __future__ import annotations

from pathlib import Path

from baton.shared.tokenizer.files import load_tokenizer


def different_token(first_dir: Path, second_dir: Path) -> tuple[int, str, str] | None:
    """The lowest token id that is another token in the other model, and what it is in either. None:
    there is none, or one of them has no tokenizer.

    Raises:
        ModelError: a tokenizer cannot be used.
    """
    first, second = _tokens(first_dir), _tokens(second_dir)
    if first is None or second is None:
        return None
    for token_id in sorted(first.keys() | second.keys()):
        tokens = first.get(token_id), second.get(token_id)
        if tokens[0] != tokens[1]:
            shown = ["none" if token is None else repr(token) for token in tokens]
            return token_id, shown[0], shown[1]
    return None


def _tokens(model_dir: Path) -> dict[int, str] | None:
    files = load_tokenizer(model_dir)
    if files is None:
        return None
    by_token = files.tokenizer.get_vocab(with_added_tokens=True)
    return {token_id: token for token, token_id in by_token.items()}
