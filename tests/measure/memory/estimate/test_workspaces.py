import pytest
import torch

from phase1.machine.cards import Chip
from phase1.measure.memory.estimate.allocator import MIB
from phase1.measure.memory.estimate.workspaces import ModelledCuda, Processors, processors, scratch_bytes, workspace_bytes

aten = torch.ops.aten
H100 = Processors(132, 2048)


@pytest.mark.parametrize(
    "capability, size", [((9, 0), 32 * MIB), ((10, 0), 32 * MIB), ((8, 6), 8.125 * MIB), ((8, 9), 8.125 * MIB)]
)
def test_a_workspace_is_32_mib_on_hopper_and_its_successors(capability, size):
    assert workspace_bytes(Chip(*capability)) == size


def test_each_of_the_two_threads_gets_a_workspace_at_its_first_product():
    cuda = ModelledCuda(Chip(8, 6))
    asked = [(aten.add.Tensor, "forward"), (aten.mm.default, "forward"), (aten.bmm.default, "forward"), (aten.mm.default, "backward"),
             (aten.addmm.default, "optimizer")]  # fmt: skip
    size = workspace_bytes(Chip(8, 6))
    assert [cuda.before(func, phase) for func, phase in asked] == [0, size, 0, size, 0]


def test_the_gradient_of_an_embedding_has_partial_sums_only_where_rows_are_sorted():
    def scratch(n, rows, width=64):
        return scratch_bytes(
            aten.embedding_dense_backward.default, (torch.empty(n, width), torch.empty(n), rows, -1, False), H100
        )

    assert scratch(3072, 10_000) == 0
    assert scratch(4000, 10_000) == 4 * 8 * 4000 + 4 * 64 * (400 + 4000)
    assert scratch(4000, 50) == 4 * 8 * 4000 + 4 * 64 * (400 + 50)


def test_accumulating_by_index_sorts_and_copies_values_that_are_not_contiguous():
    indices, values = [torch.zeros(10, dtype=torch.long)], torch.empty(10, 6)
    assert scratch_bytes(aten.index_put.default, (None, indices, values, True), H100) == 5 * 8 * 10
    assert scratch_bytes(aten.index_put.default, (None, indices, torch.empty(6, 10).T, True), H100) == 5 * 8 * 10 + 240
    assert scratch_bytes(aten.index_put.default, (None, indices, values), H100) == 0


def test_a_logsumexp_copies_its_input():
    assert scratch_bytes(aten.logsumexp.default, (torch.empty(10, 30, dtype=torch.float16), [1]), H100) == 600


def test_the_backward_pass_of_attention_sums_the_gradient_of_its_queries_in_float32():
    query = torch.empty(2, 4, 8, 16, dtype=torch.float16)
    assert scratch_bytes(aten._scaled_dot_product_flash_attention_backward.default, (query, query), H100) == 4 * 2 * 4 * 8 * 16


def test_other_operators_have_none():
    assert scratch_bytes(aten.mm.default, (torch.empty(2, 2), torch.empty(2, 2)), H100) == 0


def sum_scratch(*shape, dims, dtype=torch.float16, card=H100):
    return scratch_bytes(aten.sum.dim_IntList, (torch.empty(*shape, dtype=dtype, device="meta"), dims), card)


def test_a_sum_over_many_rows_is_split_between_blocks_of_threads_that_leave_their_parts_in_memory():
    # 4 columns a thread, 32 x 4 threads a block: 250 blocks for 32000 columns, 16 blocks at a time on each multiprocessor
    assert sum_scratch(2048, 32000, dims=[0]) == 4 * 32000 * 9 * 32 * 4  # 2112 / 250 blocks share a column
    assert sum_scratch(4, 2048, 1024, dims=[0, 1]) == 4 * 1024 * 128 * 32 * 4  # 16 of the 2048 rows of a thread are the least
    assert sum_scratch(4, 2048, 1024, dims=[0, 1], dtype=torch.float32) == 4 * 1024 * 128 * 32 * 4  # in float32 either way
    assert sum_scratch(4, 2048, 1024, dims=[0, 1], card=Processors(8, 2048)) == 4 * 1024 * 16 * 32 * 4


def test_a_sum_over_few_rows_or_along_memory_or_of_an_odd_number_of_columns_is_not():
    assert sum_scratch(1020, 32000, dims=[0]) == 0
    assert sum_scratch(2048, 32000, dims=[1]) == 0
    assert sum_scratch(2048, 32001, dims=[0]) == 0  # a column a thread: 16 rows of threads, 128 rows each
    assert sum_scratch(2048, 32000, dims=[]) == sum_scratch(0, 32000, dims=[0]) == 0
    assert sum_scratch(2048, 32000, dims=[0], card=Processors(8, 2048)) == 0  # 250 blocks keep it busy


def test_a_card_of_unknown_compute_capability_works_like_an_h100():
    assert processors(Chip(9, 0)) == processors(Chip(11, 0)) == H100
    assert processors(Chip(8, 6)) == Processors(68, 1536)


def test_the_fused_mixer_holds_gradients_of_its_operands_besides_what_it_returns():
    pytest.importorskip("triton")
    import phase1.ops.ar_ssm.fused  # noqa: F401  # registers the operators

    B, T, H, R, P = 2, 64, 2, 8, 16
    proj = torch.empty(B, T, H * (2 * P + 2 * R + 1), dtype=torch.float16)
    q_scale, state_scale = torch.empty(H, R), torch.empty(H, P)
    state = torch.empty(B, H, R, P)
    forward = scratch_bytes(torch.ops.phase1.ar_ssm.default, [proj, *[None] * 5, q_scale, state_scale, *[None] * 6], H100)
    assert forward == 0, "one stretch adds to no state"
    for first, last, states in ((None, None, 0), (None, state, 2), (state, None, 3), (state, state, 3)):
        args = [None, None, last, None, None, proj, *[None] * 5, q_scale, state_scale, *[None] * 5, first]
        backward = scratch_bytes(torch.ops.phase1.ar_ssm_backward.default, args, H100)
        assert backward == B * T * H * (2 * (3 * P + 4 * R) + 16) + states * state.nbytes


def test_the_gradients_of_a_table_hold_those_of_rows_that_use_and_are_used_and_sums_of_chunks():
    import phase1.ops.anchored_table  # noqa: F401  # registers the operators

    table, users = torch.empty(900, 32, dtype=torch.float16), [*[None] * 3, torch.empty(11)]
    func = torch.ops.phase1.anchored_table_backward.default
    assert scratch_bytes(func, [table, table, [], None, None, users, [100, 300, 900]], H100) == 32 * (200 * 2 + 11 * 4)
    assert scratch_bytes(func, [table, table, [], None, None, users, [100, 900]], H100) == 32 * 11 * 4


def test_an_estimate_for_a_card_is_of_the_operators_that_run_there():
    pytest.importorskip("triton")
    from phase1.config import EngineShape
    from phase1.measure.memory.case import MemoryCase
    from phase1.measure.memory.estimate.estimate import estimate_memory
    from phase1.roster import model_config

    sizes = EngineShape(vocab_size=300, d_model=64, n_layers=1, n_heads=2, htt_dense_rows=16, htt_groups=8)
    case = MemoryCase(model_config("phase1", sizes, recompute="none"), 2, 512)
    peaks = [estimate_memory(case, Chip(*capability)).peak_allocated_bytes for capability in ((7, 5), (8, 6))]
    assert peaks[1] < peaks[0], "the kernels of newer cards keep less than PyTorch's operators"
