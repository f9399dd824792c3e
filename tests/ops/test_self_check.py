"""The check of the kernels but those of AR-SSM, on a card that is not there: they run in Triton's interpreter."""

import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from phase1.ops import card, self_check
from phase1.ops.anchored_table import kernel as table_kernel
from phase1.ops.cross_entropy import kernel as row_kernel
from phase1.ops.cross_entropy import rows
from phase1.ops.group_nll import kernel as group_kernel
from phase1.ops.pointer import blocked, op
from phase1.ops.pointer import kernel as pointer_kernel
from phase1.ops.rotary import angles
from phase1.ops.rotary import kernel as angle_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OTHER = torch.float16  # the interpreter has no products in bfloat16
FORMS = [(pointer_kernel, "normalizers"), (pointer_kernel, "gradients"), (group_kernel, "losses"), (group_kernel, "gradients")]
FORMS += [(table_kernel, "table"), (table_kernel, "gradients")]
FORMS += [(row_kernel, "softmax_rows_kernel"), (angle_kernel, "rotary_angles_kernel")]


@pytest.fixture(autouse=True)
def a_card(monkeypatch, tmp_path, named_card):
    """An empty cache, and nothing known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(self_check, "compile_together", lambda work: None)  # which would ask a second time on a GPU
    monkeypatch.setattr(self_check, "LENGTH", 50)
    monkeypatch.setattr(self_check, "DISPROVEN", {})
    self_check._proven.cache_clear()
    yield
    self_check._proven.cache_clear()


@pytest.fixture
def asked(monkeypatch):
    """The types in which the kernels are checked."""
    types, check = [], self_check.worst_error
    monkeypatch.setattr(self_check, "worst_error", lambda device, dtype: types.append(dtype) or check(DEVICE, dtype))
    return types


def runs(dtype=torch.float32):
    return card.runs_kernels(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, OTHER])
def test_right_kernels_are_within_a_tenth_of_the_limit(dtype):
    assert 0 < self_check.worst_error(DEVICE, dtype) <= self_check.LIMIT[dtype] / 10


def test_a_type_is_checked_once_on_this_machine_and_that_it_takes_a_minute_is_said(asked, capsys):
    for _ in range(2):
        assert runs() and runs()
        self_check._proven.cache_clear()  # as in another process
    assert capsys.readouterr().err.count("are compiled and checked, once on this card") == 1
    assert runs(OTHER) and asked == [torch.float32, OTHER] and self_check.DISPROVEN == {}


def test_one_rank_of_many_says_that_it_takes_a_minute(monkeypatch, capsys, asked):
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert runs() and not capsys.readouterr().err


@pytest.mark.parametrize("form, name", FORMS, ids=lambda x: getattr(x, "__name__", x))
def test_a_fault_of_any_kernel_is_found_said_in_one_line_and_the_forms_in_pytorch_run(monkeypatch, asked, form, name):
    right = getattr(form, name)

    def halved(*arguments):
        found = right(*arguments)
        if found is None:  # softmax_rows has written it over the logits
            return arguments[0].div_(2)
        return found / 2 if torch.is_tensor(found) else (*found[:-1], found[-1] / 2)

    monkeypatch.setattr(form, name, halved)
    q = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.float32, shape=(1, 1, 64))
    for _ in range(2):
        self_check._proven.cache_clear()
        with pytest.warns(UserWarning, match=f"^kernels of {self_check.KERNELS} fail their check on a card .*relative error.*PyTorch"):
            assert op._form(q) is blocked
        assert rows._form(q) is rows.softmax_rows_reference and angles._form(q) is angles.rotary_angles_reference
    assert len(asked) == 1 and list(self_check.DISPROVEN) == [self_check.KERNELS]


@pytest.mark.parametrize("old, dtype, runs", [(False, OTHER, True), (True, OTHER, False), (False, torch.float64, False)])
def test_loss_and_positions_take_their_kernels_where_they_run(monkeypatch, asked, old, dtype, runs):
    if old:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="a card", major=7, minor=0))
    like = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=dtype)
    assert rows._form(like) is (row_kernel.softmax_rows_kernel if runs else rows.softmax_rows_reference)
    assert angles._form(like) is (angle_kernel.rotary_angles_kernel if runs else angles.rotary_angles_reference)
    assert bool(asked) is runs


def test_a_result_that_is_no_number_is_wrong_by_any_measure():
    right = torch.ones(3)
    assert self_check.relative_error([right, right * torch.nan], [right.double()] * 2) == float("inf")
    assert self_check.relative_error([right, right * 1.5], [right.double()] * 2) == pytest.approx(0.5)


def test_what_a_compiler_raises_is_a_failure_too(monkeypatch, asked):
    monkeypatch.setattr(table_kernel, "table", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        assert not runs()


def test_while_a_graph_is_captured_nothing_is_checked_and_an_earlier_answer_counts(monkeypatch, asked):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert runs() and asked == []
    monkeypatch.setitem(self_check.DISPROVEN, self_check.KERNELS, "relative error 1")
    assert not runs()


def test_the_check_leaves_the_program_alone(asked):
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert runs()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", list(self_check.LIMIT), ids=str)
def test_on_a_gpu_every_kernel_passes_in_every_type(monkeypatch, dtype):
    monkeypatch.undo()
    assert self_check.worst_error(DEVICE, dtype) <= self_check.LIMIT[dtype] / 3
