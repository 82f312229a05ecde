"""Predicted time of one attention layer on more GPUs than were measured, with constants from a results file.

Forward + backward of one layer, batch 1, P ranks, T tokens in n = T / C chunks, zigzag layout, exchange "selective":

    compute  = pair_ns x density x Hkv x T x (n + 1) / 2 / P x imbalance  +  routing_ns x Hq x T x (n + 1) / 2 / P
    travel   = coverage(T / 2P) x bytes of K and V x (P - 1) / P             into the busiest rank, and out of it
    exposed  = max(0, travel / link - own forward) + max(0, 3 travel / link - own backward) + 2 x summaries / link

pair_ns: nanoseconds of stage 3, both passes, per selected (token, KV head, chunk) triple; routing_ns: of stages 1 and 2
per (query head, summary) pair; both from the row with the longest sequence. own: the part of the computation on the
rank's own shard, 1 / P of it. 3 travel: K and V again, and their gradients in float32. coverage(m): the share of all
chunks that m neighbouring tokens select between them.

Between nodes of NODE ranks there is a second, slower link. Flat, a rank fetches the blocks of other nodes over it. In
two levels a block crosses it once for all ranks of a node, which share the fetching, and then travels over the fast
link: the two times are added. `dash_dist.cost_model` counts the blocks and the seconds.

Knows results files and the cost model; does not know how the rows were measured.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from dash_dist.cost_model.exchange import expected_busiest, forward_share
from dash_dist.cost_model.exchange import exposed as unhidden
from dash_dist.cost_model.links import ADAPTER_PUBLISHED, Links
from dash_dist.cost_model.topology import Topology
from tools.benchmarks.common.inputs import DTYPES, Case
from tools.benchmarks.common.markdown import number, table
from tools.benchmarks.context_parallel.results import ExchangeRow, Results

DEFAULT_RANKS = (8, 16, 32, 64, 128, 256, 512)
DEFAULT_SEQ_LENS = (2**20, 2**22, 2**24)
NODE = 8  # ranks with fast links between them
NETWORK = ADAPTER_PUBLISHED / 1e9  # GB/s per GPU between nodes
GRADIENT_BYTES = 4  # float32
# Neighbouring tokens with equal selections, without measured coverage: correlation length of the "smooth" inputs.
ALIKE = 100


@dataclass(frozen=True)
class Constants:
    """Measured constants; nanoseconds, GB/s. forward_share: of the computation of stage 3.

    coverage: (tokens, share of all chunks that so many neighbouring tokens select), by tokens; empty: not measured.
    """

    case: Case
    density: float
    pair_ns: float
    routing_ns: float
    forward_share: float
    imbalance: float
    link: float
    coverage: tuple[tuple[int, float], ...] = ()

    def coverage_of(self, tokens: float) -> float:
        """Interpolated in the logarithm of tokens, and constant beyond what was measured. Where nothing was: that of
        groups of ALIKE tokens that select independently of each other.
        """
        if not self.coverage:
            return 1 - (1 - self.density) ** max(tokens / ALIKE, 1.0)
        place = bisect.bisect([measured for measured, _ in self.coverage], tokens)
        if place in (0, len(self.coverage)):
            return self.coverage[min(place, len(self.coverage) - 1)][1]
        (low, below), (high, above) = self.coverage[place - 1 : place + 1]
        return below + (above - below) * math.log(tokens / low) / math.log(high / low)


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one attention layer; exposed_*: communication that nothing hides, by link."""

    ranks: int
    seq_len: int
    coverage: float
    routing: float
    compute: float
    exposed_fast: float
    exposed_flat: float
    exposed_two_level: float

    def efficiency(self, exposed: float) -> float:
        """Computation / (computation + exposed communication)."""
        return self.compute / (self.compute + exposed)


def constants_of(row: ExchangeRow, link: float) -> Constants:
    """From a row's fastest exchange. link: GB/s per rank. Raises ValueError where none was measured."""
    ours = {
        name: column
        for name, column in row.columns.items()
        if name not in row.dense and column.step.median_ms is not None
    }
    if not ours or row.routing.median_ms is None or row.density is None or row.imbalance is None:
        raise ValueError(f"{row.label}: no exchange or no routing was measured, so there is nothing to predict from")
    fastest = min(ours.values(), key=lambda column: column.step.median_ms or math.inf)
    assert fastest.step.median_ms is not None
    assert fastest.forward.median_ms is not None  # measured together
    attention = fastest.step.median_ms - row.routing.median_ms
    queries_by_summaries = row.case.available / row.case.kv_heads * row.case.query_heads / row.ranks
    return Constants(
        case=row.case,
        density=row.density,
        pair_ns=attention * 1e6 / max(row.selected),
        routing_ns=row.routing.median_ms * 1e6 / queries_by_summaries,
        forward_share=(fastest.forward.median_ms - row.routing.median_ms) / attention,
        imbalance=row.imbalance,
        link=link,
        coverage=tuple(sorted((int(tokens), share) for tokens, share in row.coverage.items())),
    )


def predict(constants: Constants, ranks: int, seq_len: int, network: float = NETWORK) -> Prediction:
    """Predict one layer as the module's docstring states. network: GB/s per GPU between nodes.

    Nodes hold the largest number of ranks that divides both `ranks` and NODE.
    """
    case = constants.case
    pairs = seq_len * (seq_len // case.chunk_size + 1) / 2 / ranks  # (token, chunk) of a rank
    attention = constants.pair_ns * constants.density * case.kv_heads * pairs * constants.imbalance / 1e6
    routing = constants.routing_ns * case.query_heads * pairs / 1e6
    tokens = seq_len / (2 * ranks)  # of the rank's late piece, which can reach nearly every chunk
    blocks = case.kv_heads * seq_len / case.chunk_size
    item = DTYPES[case.dtype].itemsize
    summary_bytes = blocks * case.head_dim * 4 * (ranks - 1) / ranks
    forward = forward_share("selective", ranks, item, GRADIENT_BYTES)
    block_bytes = 2 * case.chunk_size * case.head_dim * (2 * item + GRADIENT_BYTES)  # in both passes
    own = [attention * share / ranks for share in (constants.forward_share, 1 - constants.forward_share)]
    links = Links(0.0, constants.link * 1e9, network * 1e9)

    def exposed(fast: float, slow: float) -> float:
        """Milliseconds that nothing hides of so many blocks by link, and of the summaries over the slower one."""
        travel = links.seconds(fast * block_bytes, slow * block_bytes) * 1e3
        summaries = links.seconds(*((0.0, summary_bytes) if slow else (summary_bytes, 0.0))) * 1e3
        return unhidden([travel * forward, travel * (1 - forward)], own) + 2 * summaries

    node = math.gcd(ranks, NODE)
    one_domain = expected_busiest(blocks, tokens, Topology(ranks, ranks), constants.coverage_of)
    fast = exposed(one_domain.fast, 0)
    two_level = expected_busiest(blocks, tokens, Topology(ranks, node), constants.coverage_of)
    coverage = constants.coverage_of(tokens)
    return Prediction(
        ranks,
        seq_len,
        coverage,
        routing,
        attention + routing,
        exposed_fast=fast,
        exposed_flat=exposed(0, coverage * blocks * (ranks - node) / ranks) if ranks > node else fast,
        exposed_two_level=exposed(two_level.fast, two_level.slow),
    )


def predictions(results: Results, ranks: list[int], seq_lens: list[int]) -> str:
    """Markdown: for every pair of head counts and density of a results file, the assumptions and a table.

    Raises SystemExit where the file has not what the model needs.
    """
    if not results.exchanges or not results.link:
        raise SystemExit("predictions need the part 'exchanges' and the measured link: run the benchmark with it")
    longest: dict[tuple[int, int, float], ExchangeRow] = {}
    for row in results.exchanges:
        key = row.case.query_heads, row.case.kv_heads, row.case.asked_density
        if row.routing.median_ms is not None and (key not in longest or row.case.seq_len > longest[key].case.seq_len):
            longest[key] = row
    sections = []
    for row in longest.values():
        constants = constants_of(row, results.link["gigabytes_per_second"])
        predicted = [
            predict(constants, size, seq_len)
            for seq_len in seq_lens
            for size in ranks
            if seq_len >= 2 * size * row.case.chunk_size
        ]
        sections.append("\n\n".join([_assumptions(constants, row, results), _table(constants, predicted)]))
    return "\n\n".join(sections)


def _assumptions(constants: Constants, row: ExchangeRow, results: Results) -> str:
    case = constants.case
    measured = f"{row.ranks} x {results.environment['gpu']}, commit {results.environment['commit'][:12]}, {row.label}"
    coverage = (
        "as measured for so many neighbouring tokens, the largest measured beyond them"
        if constants.coverage
        else f"not measured: groups of {ALIKE} neighbouring tokens select independently"
    )
    return "\n".join(
        [
            f"Measured on {measured}:",
            f"- {constants.pair_ns:.3f} ns of stage 3, forward + backward, per selected (token, KV head, chunk)",
            f"- {constants.routing_ns:.5f} ns of stages 1 and 2 per (query head, summary)",
            f"- {constants.forward_share:.3f} of stage 3 is the forward pass; imbalance {constants.imbalance:.4f}",
            f"- fast link {constants.link:.1f} GB/s per rank",
            "",
            "Assumed:",
            f"- density {constants.density:.4f} at every T; heads ({case.query_heads}, {case.kv_heads}), head_dim "
            f"{case.head_dim}, chunks of {case.chunk_size}, {case.dtype}; one layer, batch 1, zigzag, as well balanced",
            f"- the kernels are as fast per pair on short shards as on {case.seq_len // row.ranks} tokens",
            f"- coverage: {coverage}",
            "- K and V travel in both passes, their gradients home in float32; only computation on the own shard "
            "hides them; the busiest rank may need every chunk",
            f"- {NODE} ranks a node; {NETWORK:g} GB/s per GPU between nodes; every link at its measured or named rate; "
            "latencies, the plan's bitmaps and collisions in the network not counted",
            "- NVLink: all ranks in one such domain; 50 GB/s flat: each rank fetches for itself; two-level: a block "
            "crosses to a node once",
        ]
    )


def _table(constants: Constants, predicted: list[Prediction]) -> str:
    header = ["CP", "T", "compute ms", "of it routing", "coverage"]
    for link in ("NVLink", f"{NETWORK:g} GB/s flat", f"{NETWORK:g} GB/s two-level"):
        header += [f"exposed ms, {link}", "efficiency"]
    rows = []
    for prediction in predicted:
        cells = [
            str(prediction.ranks),
            str(prediction.seq_len),
            number(prediction.compute, 1),
            number(prediction.routing, 1),
            number(prediction.coverage, 3),
        ]
        for exposed in (prediction.exposed_fast, prediction.exposed_flat, prediction.exposed_two_level):
            cells += [number(exposed, 1), number(prediction.efficiency(exposed), 2)]
        rows.append(cells)
    return table(f"Predicted, one attention layer, forward + backward, density {constants.density:.3f}", header, rows)
