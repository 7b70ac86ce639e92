"""Traces through the production scheduler: the measure itself, and the gaps that policies leave."""

from pathlib import Path

import pytest

from kernel.errors import LlmosError, UsageError
from plugins.benchmarks.replay import Replay, fairness, latency, overloaded_engine
from plugins.benchmarks.scale import scale
from plugins.benchmarks.trace import Meter, Request, Served, gap, overload, read_trace, write_served

WINDOW_S = (10.0, 40.0)


def served_by(policy: str, weights: dict[str, float], tokens: tuple[int, int] = (64, 64)) -> Replay:
    requests = overload(dict.fromkeys(weights, 12.0), 45.0, tokens)
    replay = Replay(requests, overloaded_engine(requests), policy, weights, WINDOW_S)
    replay.done = replay.run()  # type: ignore[attr-defined]
    return replay


def write_trace(path: Path, requests: list[Request]) -> Path:
    lines = [f"{r.arrival_s:.3f},{r.client},{r.prompt_tokens},{r.output_tokens}" for r in requests]
    path.write_text("arrival_s,client,prompt_tokens,output_tokens\n" + "\n".join(lines) + "\n")
    return path


def test_the_gap_of_a_trace_served_evenly_is_one_request() -> None:
    served = [
        Served(Request(n * 1.0, client, 100, 51), n * 1.0, n * 1.0 + 1.0)
        for n in range(60)
        for client in "ab"
    ]
    even = gap(served, {"a": 1.0, "b": 1.0}, WINDOW_S)
    assert even.max_gap <= 102 and even.jain == pytest.approx(1.0)
    assert even.service_units_per_s == pytest.approx(2 * 202, rel=0.05)
    tilted = gap(served, {"a": 1.0, "b": 2.0}, WINDOW_S)
    assert tilted.max_gap == pytest.approx(30 * 202 / 2, rel=0.05)
    assert tilted.jain == pytest.approx(1.5**2 / (2 * 1.25), rel=0.01)
    assert tilted.worst_share_error == pytest.approx(0.5, rel=0.02)


def test_nothing_served_in_the_window_is_said() -> None:
    with pytest.raises(UsageError, match="nothing was served"):
        Meter({"a": 1.0}, WINDOW_S).gap()


def test_fair_serves_overloading_clients_by_weight() -> None:
    weights = {"0": 1.0, "1": 3.0}
    done = served_by("fair", weights).done  # type: ignore[attr-defined]
    seen = gap(done.served, weights, WINDOW_S)
    assert seen.jain > 0.9995 and seen.worst_share_error < 0.02
    assert seen.max_gap < 2 * 192  # two requests of 64 + 2 * 64
    assert done.ledger.max_gap < 192
    assert seen.service_units_per_s == pytest.approx(1350, rel=0.02)


def test_fifo_does_not() -> None:
    weights = {"0": 1.0, "1": 3.0}
    done = served_by("fifo", weights).done  # type: ignore[attr-defined]
    assert gap(done.served, weights, WINDOW_S).jain < 0.9


def test_every_request_gets_its_tokens_after_it_arrived() -> None:
    done = served_by("fair", {"0": 1.0, "1": 1.0}, (30, 1)).done  # type: ignore[attr-defined]
    for each in done.served:
        assert each.request.arrival_s < each.first_token_s == each.finish_s


def test_a_trace_comes_back_as_it_was_served(tmp_path: Path) -> None:
    requests = overload({"x": 8.0, "y": 8.0}, 40.0, (64, 64))
    trace = write_trace(tmp_path / "trace.csv", requests)
    out = tmp_path / "served.csv"
    result = fairness(trace, (1.0, 1.0), "fair", out, limit=len(requests))
    again = read_trace(out)
    assert [(r.client, r.prompt_tokens) for r in again] == [(r.client, r.prompt_tokens) for r in requests]
    assert out.read_text().startswith("arrival_s,client,prompt_tokens,output_tokens,first_token_s,finish_s\n")
    assert set(result) == {
        "max_gap", "ledger_gap", "jain", "worst_share_error", "service_units_per_s", "events_per_s",
    }  # fmt: skip
    with pytest.raises(UsageError, match="3 weights for 2 clients"):
        fairness(trace, (1.0, 1.0, 1.0))


def test_latency_by_policy_from_either_format(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        "".join(f'{{"timestamp": {n * 200}, "input_length": 300, "output_length": 20}}\n' for n in range(60))
    )
    table = latency(trace, limit=50)
    assert set(table) == {"fair", "fifo", "rr"}
    for row in table.values():
        assert 0 < row["ttft_p50_s"] <= row["ttft_p99_s"] and 0 < row["itl_p50_s"] <= row["itl_p99_s"]


def test_prompts_share_the_blocks_that_the_trace_says(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    row = '{{"timestamp": {}, "input_length": 1200, "output_length": 5, "hash_ids": [7, {}, {}]}}\n'
    trace.write_text("".join(row.format(4000 * n, n, 50 + n) for n in range(8)))
    requests = read_trace(trace)
    assert all(len(request.prompt().split()) == 1200 for request in requests)
    alone = latency(trace, ("fair",))["fair"]
    shared = latency(trace, ("fair",), shares_prefixes=True)["fair"]
    assert alone["shared"] == 0.0
    assert 0.3 < shared["shared"] <= 7 * 512 / (8 * 1200)  # the first may be at it when the second comes
    assert shared["ttft_p50_s"] < 0.7 * alone["ttft_p50_s"]
    plain = write_trace(tmp_path / "plain.csv", [Request(0.0, "0", 5, 5), Request(1.0, "0", 5, 5)])
    with pytest.raises(UsageError, match="does not say what prompts have in common"):
        latency(plain, ("fair",), shares_prefixes=True)


def test_scale_reports_growth_and_bytes() -> None:
    result = scale((50, 200), 300)
    assert list(result.processes) == ["50", "200"] and result.growth("decision_p50_us") > 0
    assert 200 < result.bytes_per_process < 20_000


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "arrival_s,client,prompt_tokens,output_tokens\nx,0,1,1\n", "", "\0"]
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(text)
    with pytest.raises(UsageError, match=r"is not a trace|has no requests"):
        read_trace(trace)


HEAD = "arrival_s,client,prompt_tokens,output_tokens\n0,a,5,5\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", HEAD + "nan,a,5,5\n"),  # for such an arrival a replay would wait for ever
        ("t.csv", HEAD + "inf,a,5,5\n"),
        ("t.csv", HEAD + "-1,a,5,5\n"),
        ("t.csv", HEAD + "1,a,-5,5\n"),
        ("t.csv", HEAD + "1,a,5,99999999\n"),
        ("t.csv", HEAD + "1,a\n"),
        ("t.jsonl", '{"timestamp": 1, "input_length": 5, "output_length": 5}\n{"timestamp": 1}\n'),
        ("t.jsonl", '{"timestamp": 1, "input_length": 5, "output_length": 5}\n[1]\n'),
        (
            "t.jsonl",
            '{"timestamp": 1, "input_length": 5, "output_length": 5}\n'
            '{"timestamp": 1, "input_length": 5, "output_length": 2.5}\n',
        ),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    line = text.count("\n")
    with pytest.raises(UsageError, match=rf"is not a trace: line {line}: "):
        read_trace(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("\ufeff" + HEAD, encoding="utf-8")
    assert read_trace(tmp_path / "t.csv") == [Request(0.0, "a", 5, 5)]


def test_where_the_answers_go_is_looked_at_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(HEAD)
    told: list[int] = []
    with pytest.raises(LlmosError, match="cannot write"):
        fairness(tmp_path / "t.csv", served=tmp_path / "no" / "x", report=lambda done, of: told.append(done))
    with pytest.raises(UsageError, match="would replace the trace"):
        fairness(tmp_path / "t.csv", served=tmp_path / "t.csv")
    assert not told and (tmp_path / "t.csv").read_text() == HEAD


def test_requests_that_all_arrive_at_once_load_no_engine(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(HEAD + "0,b,5,5\n")
    with pytest.raises(UsageError, match="all 2 requests arrive at once"):
        latency(tmp_path / "t.csv")


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(LlmosError, match="cannot read"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(LlmosError, match="cannot write"):
        write_served(tmp_path / "no" / "such.csv", [])
