"""The frames between a worker and its parent: what goes in comes out, and nonsense is refused."""

import contextlib
import inspect
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers import wire
from drivers.wire import Frame, FrameReader, Kind, Nonsense
from kernel import errors
from kernel.device import (
    EngineInfo,
    EngineOptions,
    Opened,
    Prompt,
    Sampling,
    SequenceStep,
    StepEvent,
)

counts = st.integers(0, 2**40)
tokens = st.integers(0, 2**31 - 1)
reals = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=[]), max_size=40)  # surrogates included
token_tuples = st.lists(tokens, max_size=20).map(tuple)


def every_field(kind: type, **strategies: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """Instances of a (named) tuple or dataclass, a strategy for each field: a new one must go on the wire."""
    assert set(strategies) == set(inspect.signature(kind).parameters)
    return st.builds(kind, **strategies)


prompts = every_field(
    Prompt,
    text=text,
    messages=st.lists(st.tuples(text, text), max_size=3).map(tuple),
    tokens=token_tuples,
    prompt_tokens=counts,
    max_tokens=counts,
    reply_bounds=token_tuples,
)
samplings = every_field(
    Sampling,
    temperature=reals,
    top_k=counts,
    top_p=reals,
    min_p=reals,
    repeat_penalty=reals,
    seed=st.integers(),
    ignore_eos=st.booleans(),
    exact=st.booleans(),
)
options = every_field(
    EngineOptions, context_tokens=counts, sequences=counts, threads=counts, kv_tokens=counts
)
opened = every_field(Opened, tokens=token_tuples, shared_tokens=counts)
infos = every_field(
    EngineInfo,
    context_tokens=counts,
    sequences=counts,
    weights_bytes=counts,
    kv_bytes_per_token=counts,
    kv_bytes=counts,
    compute_bytes=counts,
    step_cost_s=st.dictionaries(counts, reals, max_size=4),
    prefill_token_s=reals,
    copy_token_s=reals,
    abortable=st.booleans(),
)
steps = every_field(
    SequenceStep,
    seq=st.integers(0, 2**16 - 1),
    prompt_tokens=st.integers(0, 2**32 - 1),
    token=st.none() | tokens,
    text=text,
    finish=st.sampled_from([None, "stop", "length", "context"]),
    opened=st.none() | opened,
    error=st.none() | st.builds(errors.ContextFull, text, text),
    shared_tokens=counts,
    stuck=st.booleans(),
)
events = every_field(
    StepEvent,
    quantum=st.integers(-(2**63), 2**63 - 1),
    step_s=reals,
    sequences=st.lists(steps, max_size=20).map(tuple),
)


def comparable(event: StepEvent) -> tuple[object, ...]:
    """Errors are equal only to themselves, so they are compared by what they say."""
    said = [
        step.error and (type(step.error), step.error.message, step.error.hint) for step in event.sequences
    ]
    bare = tuple(step._replace(error=None) for step in event.sequences)
    return event._replace(sequences=bare), said


def carried(frame: Frame) -> Frame:
    """A frame after a trip over the wire."""
    (arrived,) = FrameReader().feed(b"".join(frame.encode()))
    return arrived


@pytest.mark.parametrize(
    ("values", "encode", "decode"),
    [
        (prompts, wire.encode_prompt, wire.decode_prompt),
        (samplings, wire.encode_sampling, wire.decode_sampling),
        (options, wire.encode_options, wire.decode_options),
        (opened, wire.encode_opened, wire.decode_opened),
        (infos, wire.encode_info, wire.decode_info),
    ],
    ids=["prompt", "sampling", "options", "opened", "info"],
)
@given(data=st.data())
def test_value_survives_the_wire(
    values: st.SearchStrategy[object],
    encode: Callable[[object], object],
    decode: Callable[[object], object],
    data: st.DataObject,
) -> None:
    value = data.draw(values)
    assert decode(carried(Frame(Kind.OPEN, encode(value))).header) == value


@given(st.lists(events, max_size=4))
def test_steps_survive_packing(sent: list[StepEvent]) -> None:
    blob = b"".join(wire.pack_step(event.quantum, event) for event in sent)
    assert [comparable(event) for event in wire.unpack_steps(blob)] == [comparable(event) for event in sent]


@given(st.lists(st.tuples(text, st.binary(max_size=50)), max_size=5), st.integers(1, 40))
def test_stream_cut_anywhere_gives_the_same_frames(contents: list[tuple[str, bytes]], cut: int) -> None:
    frames = [Frame(Kind.LOG, header, blob) for header, blob in contents]
    stream = b"".join(part for frame in frames for part in frame.encode())
    reader = FrameReader()
    arrived = [f for at in range(0, len(stream), cut) for f in reader.feed(stream[at : at + cut])]
    assert arrived == frames
    assert not reader.is_partial


@given(st.binary(min_size=16, max_size=200))
def test_random_bytes_are_nonsense(noise: bytes) -> None:
    with pytest.raises(Nonsense):
        list(FrameReader().feed(b"?" + noise))


@given(st.lists(events, min_size=1, max_size=2), st.data())
def test_damaged_steps_raise_only_nonsense(sent: list[StepEvent], data: st.DataObject) -> None:
    blob = bytearray(b"".join(wire.pack_step(1, event) for event in sent))
    for at in data.draw(st.lists(st.integers(0, len(blob) - 1), max_size=8)):
        blob[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(Nonsense):
        list(wire.unpack_steps(bytes(blob[: data.draw(st.integers(0, len(blob)))])))


def test_absurd_lengths_are_refused_before_they_are_read() -> None:
    head = wire._HEAD.pack(b"LM", Kind.REPLY, 2, wire.MAX_BLOB_BYTES + 1)
    with pytest.raises(Nonsense):
        list(FrameReader().feed(head))


@pytest.mark.parametrize("header", [None, [], [1, 2], ["a", [], ["x"], 0, 0], ["a", [["u"]], [], 0, 0]])
def test_wrong_shapes_are_nonsense(header: object) -> None:
    with pytest.raises(Nonsense):
        wire.decode_prompt(header)


def all_errors() -> list[type[errors.LlmosError]]:
    """The kernel's; those that a shell adds never cross the wire."""
    found = (getattr(errors, name) for name in dir(errors))
    return [kind for kind in found if isinstance(kind, type) and issubclass(kind, errors.LlmosError)]


@pytest.mark.parametrize("kind", all_errors())
def test_error_keeps_class_message_and_hint(kind: type[errors.LlmosError]) -> None:
    arrived = wire.decode_error(carried(Frame(Kind.ERROR, wire.encode_error(kind("why", "do this")))).header)
    assert (type(arrived), arrived.message, arrived.hint) == (kind, "why", "do this")


def test_foreign_errors_become_kernel_faults_of_one_line() -> None:
    arrived = wire.decode_error(wire.encode_error(OSError("no\nroom")))
    assert type(arrived) is errors.KernelFault
    assert arrived.message == "OSError: no room"
    assert type(wire.decode_error(["system", "message", ""])) is errors.KernelFault


def test_small_frame_is_one_send_and_large_blob_is_not_copied() -> None:
    blob = bytes(wire.CHUNK_BYTES + 1)
    assert len(Frame(Kind.STEPS, [7, False], b"steps").encode()) == 1
    assert Frame(Kind.REPLY, blob=blob).encode()[1] is blob
