"""From a conversation to token ids with the model's own chat template, and from token ids back to text.

A prompt cannot forge control tokens. The template's output mixes text of the template, where `<|im_end|>` is a control
token, with text of the users, where it is ten characters. The two are told apart in three steps:

1. In every message, each special token's text is replaced by a placeholder, and the template is rendered.
2. What the result still holds of special tokens comes from the template: these become markers. The placeholders become
   the users' text again.
3. The tokenizer encodes the whole with special tokens switched off and the markers as added tokens, whose ids are then
   those of the special tokens.

Placeholders and markers hold 128 random bits, so no message contains one; the ids do not depend on them. Otherwise the
ids are those of transformers' `apply_chat_template` with `add_generation_prompt=True`.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Final, NoReturn, cast

import jinja2
import jinja2.sandbox
from tokenizers import AddedToken, Tokenizer

from aci_p2p.executor.api import Message, ModelUnavailable, TemplateRefused
from aci_p2p.executor.files import malformed, read_json
from aci_p2p.executor.store import CONFIG_BYTES_MAX, CONFIG_FILE, TOKENIZER_FILE
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.text import printable

TOKENIZER_CONFIG_FILE: Final = "tokenizer_config.json"
TEMPLATE_FILE: Final = "chat_template.jinja"
GENERATION_CONFIG_FILE: Final = "generation_config.json"
TOKENIZER_JSON_BYTES_MAX: Final = 256 << 20
"""Bytes of tokenizer.json; that of a vocabulary of 256,000 has 33 MB."""
TEMPLATE_BYTES_MAX: Final = 1 << 20
"""Bytes of a chat template; long ones have 20,000."""
ROLES: Final = ("system", "user", "assistant")
"""Who may speak in a conversation."""

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
"""What templates may refer to."""
_SENTENCEPIECE_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class ChatTokenizer:
    """The tokenizer of one model with its chat template."""

    def __init__(self, directory: Path, vocabulary: int) -> None:
        """Read the tokenizer of a Hugging Face directory whose model has `vocabulary` token ids.

        Raises ModelUnavailable when a file is missing or malformed, has more ids than the model, has no chat template
        or a decoder other than byte-level and SentencePiece with byte fallback.
        """
        path = directory / TOKENIZER_FILE
        self._tokenizer = _read_tokenizer(path)
        tokens = {index: token for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        if max(tokens, default=0) >= vocabulary:
            raise malformed(path, f"has ids beyond the model's {vocabulary}")
        added = self._tokenizer.get_added_tokens_decoder()
        special = {index: token for index, token in added.items() if token.special}
        self._markup = _Markup(self._tokenizer, special)
        self._template = _ChatTemplate(directory)
        self._pieces, self._strips = _read_pieces(path, tokens, special.keys())
        self.stop_tokens = _read_stop_tokens(directory)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the model to answer.

        Raises TemplateRefused, and LocalError on an unknown role or text that is not valid Unicode.
        """
        for message in messages:
            _check(message)
        turns = [{"role": message.role, "content": self._markup.shield(message.content)} for message in messages]
        return self._markup.encode(self._template.render(turns))

    def detokenizer(self, accepted: Sequence[int] = ()) -> Detokenizer:
        """Turns the tokens of one answer into text, those that come behind `accepted`."""
        detokenizer = Detokenizer(self._pieces, strips_first_space=self._strips)
        for token in accepted:
            detokenizer.push(token)
        return detokenizer


class Detokenizer:
    """Text of tokens as they come. What it returns, joined, is the text of all tokens decoded at once.

    A character whose bytes are spread over several tokens comes out with the last of them. Special tokens have no
    text. Bytes that are no UTF-8 become U+FFFD by maximal subparts (Unicode 16.0, section 3.9.6).
    """

    def __init__(self, pieces: Mapping[int, bytes], *, strips_first_space: bool) -> None:
        """`pieces` gives the bytes of each token id; others have none."""
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips = strips_first_space

    def push(self, token: int) -> str:
        """The text that is complete with this token."""
        return self._stripped(self._decoder.decode(self._pieces.get(token, b"")))

    def finish(self) -> str:
        """What is left after the last token: U+FFFD for an incomplete character, else nothing."""
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if self._strips and text:
            self._strips = False
            return text.removeprefix(" ")
        return text


class _Markup:
    """Keeps the control tokens of the template apart from those that users write."""

    def __init__(self, tokenizer: Tokenizer, special: Mapping[int, AddedToken]) -> None:
        """`special` are the tokenizer's special tokens by id. Adds the markers to the tokenizer."""
        self._tokenizer = tokenizer
        # Begins with a character for private use, so that no other added token begins before and reaches into it.
        nonce = "\ue000" + secrets.token_hex(16)
        texts = {token.content: index for index, token in special.items()}
        longest_first = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
        # Without special tokens the pattern matches nothing.
        self._pattern = re.compile(longest_first or r"(?!)")
        self._placeholders = {text: f"{nonce}u{index};" for text, index in texts.items()}
        self._markers = {text: f"{nonce}t{index};" for text, index in texts.items()}
        self._texts = {placeholder: text for text, placeholder in self._placeholders.items()}
        self._placeholder_pattern = re.compile(f"{nonce}u[0-9]+;")
        tokenizer.encode_special_tokens = True
        tokenizer.add_tokens(  # pyright: ignore[reportUnknownMemberType] - the stub says `list`
            [_marker(token, self._markers[token.content]) for token in special.values()]
        )
        self._ids = {tokenizer.token_to_id(self._markers[text]): index for text, index in texts.items()}

    def shield(self, content: str) -> str:
        """A user's text with placeholders."""
        return self._pattern.sub(lambda match: self._placeholders[match[0]], content)

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a rendered template."""
        marked = self._pattern.sub(lambda match: self._markers[match[0]], rendered)
        text = self._placeholder_pattern.sub(lambda match: self._texts[match[0]], marked)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._ids.get(index, index) for index in ids]


def _marker(token: AddedToken, content: str) -> AddedToken:
    return AddedToken(
        content,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=False,
    )


class _ChatTemplate:
    """A Jinja template in a sandbox, set up as transformers does.

    `strftime_now` is left undefined, so that a prompt has the same ids tomorrow; templates have a fixed date for that.
    """

    def __init__(self, directory: Path) -> None:
        config = read_json(directory / TOKENIZER_CONFIG_FILE, CONFIG_BYTES_MAX)
        self._path, source = _read_template(directory, config)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source, globals={"raise_exception": _refuse})
        except jinja2.TemplateError as error:
            raise malformed(self._path, f"has a broken chat template: {printable(str(error))}") from None
        self._tokens = {name: _token_text(config.get(name)) for name in _NAMED_TOKENS}

    def render(self, messages: list[dict[str, str]]) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
        except Exception as error:  # noqa: BLE001 - a template is a program: it fails in any way that Python does
            msg = f"the chat template in {self._path} refuses the conversation: {printable(str(error))[:200]}"
            raise TemplateRefused(msg) from None


def _refuse(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _to_json(value: Any, indent: int | None = None) -> str:  # noqa: ANN401 - whatever a template passes
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _check(message: Message) -> None:
    if message.role not in ROLES:
        msg = f"no role {message.role[:40]!r}"
        raise LocalError(msg, hint=f"the roles are {', '.join(ROLES)}")
    try:
        message.content.encode()
    except UnicodeEncodeError:
        msg = "a message is not valid Unicode: it holds a lone surrogate"
        raise LocalError(msg) from None


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        msg = f"{path} is missing"
        raise ModelUnavailable(msg, hint="fetch or copy the model again")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises Exception itself
        raise malformed(path, f"holds no tokenizer: {printable(str(error))[:200]}") from None


def _read_template(directory: Path, config: Mapping[str, object]) -> tuple[Path, str]:
    """The chat template and the file that it is in; a list of named ones gives the one named `default`."""
    path = directory / TEMPLATE_FILE
    if path.is_file():
        text = path.read_bytes()
        if len(text) > TEMPLATE_BYTES_MAX:
            raise malformed(path, f"is longer than {TEMPLATE_BYTES_MAX} bytes")
        return path, text.decode("utf-8", "replace")
    path = directory / TOKENIZER_CONFIG_FILE
    value = config.get("chat_template")
    if isinstance(value, list):
        named = cast("list[object]", value)
        entries = [cast("dict[str, object]", entry) for entry in named if isinstance(entry, dict)]
        value = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    if not isinstance(value, str):
        raise malformed(path, "has no chat template", hint="take the instruct version of the model")
    return path, value


def _token_text(value: object) -> str | None:
    """A named token, which is stored as text or as an object with its text."""
    if isinstance(value, dict):
        value = cast("dict[str, object]", value).get("content")
    return value if isinstance(value, str) else None


def _read_stop_tokens(directory: Path) -> frozenset[int]:
    """Ids that end an answer: `eos_token_id` of generation_config.json, else of config.json."""
    for name in (GENERATION_CONFIG_FILE, CONFIG_FILE):
        path = directory / name
        value = read_json(path, CONFIG_BYTES_MAX).get("eos_token_id") if path.is_file() else None
        if value is None:
            continue
        ids: list[object] = cast("list[object]", value) if isinstance(value, list) else [value]
        if not all(type(index) is int for index in ids):
            raise malformed(path, "has an eos_token_id that is neither a token id nor a list of them")
        return frozenset(cast("list[int]", ids))
    return frozenset()


def _read_pieces(path: Path, tokens: Mapping[int, str], special: AbstractSet[int]) -> tuple[dict[int, bytes], bool]:
    """The bytes of every token id, none for special tokens; and whether the first space of a text is dropped."""
    steps = _decoder_steps(path)
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        piece_of = _byte_level_piece
    elif "ByteFallback" in kinds:
        piece_of = _sentencepiece_piece
    else:
        msg = f"{path} has a decoder that the built-in executor does not have"
        raise ModelUnavailable(msg, hint="it has byte-level BPE and SentencePiece with byte fallback")
    pieces = {index: b"" if index in special else piece_of(token) for index, token in tokens.items()}
    return pieces, any(step.get("type") == "Strip" and step.get("content") == " " for step in steps)


def _decoder_steps(path: Path) -> list[dict[str, object]]:
    """The decoder of tokenizer.json as a list of steps."""
    decoder = read_json(path, TOKENIZER_JSON_BYTES_MAX).get("decoder")
    if not isinstance(decoder, dict):
        return []
    fields = cast("dict[str, object]", decoder)
    steps = fields.get("decoders")
    return cast("list[dict[str, object]]", steps) if isinstance(steps, list) else [fields]


def _byte_level_table() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE (Radford et al. 2019; GPT-2's encoder.py)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_CHARACTER: Final = _byte_level_table()


def _byte_level_piece(token: str) -> bytes:
    """Added tokens may hold characters that stand for no byte; such a token stands for itself."""
    if all(char in _BYTE_OF_CHARACTER for char in token):
        return bytes(_BYTE_OF_CHARACTER[char] for char in token)
    return token.encode()


def _sentencepiece_piece(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(_SENTENCEPIECE_SPACE, " ").encode()
