"""What the measurement of memory takes of PyTorch that PyTorch does not document: on a new version this says first what is gone."""

import pytest
import torch
from torch._subclasses import fake_tensor

PRIVATE = {
    "storages are told apart by their address": lambda: torch.empty(1).untyped_storage()._cdata,
    "a tensor says how many hold it": lambda: torch.empty(1)._use_count(),
    "a storage says how many hold it": lambda: torch._C._storage_Use_Count(torch.empty(1).untyped_storage()._cdata),
    "sizes are asked for outside modes for functions": lambda: torch._C.DisableTorchFunction(),
    "gradients are taken by a function that is replaced for a while": lambda: torch.autograd.graph._engine_run_backward,
    "a fake tensor's mode may run the shape function of an operator": lambda: fake_tensor.in_kernel_invocation_manager,
    "fake tensors are made of meta tensors": lambda: fake_tensor.FakeTensor(
        fake_tensor.FakeTensorMode(), torch.empty(1, device="meta"), torch.device("cpu")
    ),
    "a fake mode's cache can be off": lambda: fake_tensor.FakeTensorMode().cache_enabled,
}


@pytest.mark.parametrize("use", PRIVATE)
def test_this_version_of_torch_still_has_it(use):
    try:
        PRIVATE[use]()
    except (AttributeError, TypeError) as error:
        pytest.fail(f"PyTorch {torch.__version__}: {use}, by {error}; see src/phase1/measure/memory/estimate")
