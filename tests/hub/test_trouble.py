"""Errors of client and network as one sentence, without the token; what is nobody's fault but ours passes as it is."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import SafetensorsParsingError

from qwen2tool.errors import UserError
from qwen2tool.hub.trouble import in_one_sentence

TOKEN = "hf_secret"
HUB = "http://hub.test"


def sentence(error: Exception) -> str:
    with pytest.raises(UserError) as caught, in_one_sentence("me/tiny", HUB, TOKEN):
        raise error
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    return str(caught.value)


def test_the_token_is_blotted_out() -> None:
    text = sentence(SafetensorsParsingError(f"header of Bearer {TOKEN}\nmore"))
    assert text == "me/tiny: the Hub's copy cannot be read back (header of Bearer ***). Push again."


def test_the_text_of_a_network_error_is_left_out() -> None:
    text = sentence(ConnectionError(f"Illegal header value b'Bearer {TOKEN}'"))
    assert text.startswith(f"{HUB} cannot be reached (ConnectionError).")
    assert TOKEN not in text


def test_bugs_are_not_dressed_up() -> None:
    with pytest.raises(ZeroDivisionError), in_one_sentence("me/tiny", HUB, TOKEN):
        raise ZeroDivisionError
    with pytest.raises(UserError, match="as it was"), in_one_sentence("me/tiny", HUB, TOKEN):
        raise UserError("as it was", "do this")
