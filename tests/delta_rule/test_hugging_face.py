"""Values and gradients against the PyTorch implementations in Hugging Face's Qwen3-Next and Qwen3.5."""

import numpy as np
import pytest

from tests.support import delta_cases
from tests.support.compare import assert_close
from tests.support.delta_properties import evaluate

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("model", ["qwen3_next", "qwen3_5"])
@pytest.mark.parametrize(
    "function", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"]
)
def test_values_and_gradients(model, function):
    torch = pytest.importorskip("torch")
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    theirs = getattr(module, function)
    case = delta_cases.random_case(1, 2, 75, 2, 4, 16, 24)
    inputs = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in case.operands]
    query, key = (x.repeat_interleave(2, dim=2) for x in inputs[:2])  # as their layer does
    out, final = theirs(
        query, key, *inputs[2:5], initial_state=inputs[5], output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    cotangents = [torch.tensor(x, dtype=torch.float32) for x in (case.d_out, case.d_final)]
    expected = torch.autograd.grad([out, final], inputs, cotangents)
    for implementation in ("chunked", "reference"):
        got_out, got_final, grads = evaluate(
            case, use_qk_l2norm=True, implementation=implementation
        )
        assert_close(got_out, out, atol=1e-5, what="out")
        assert_close(got_final, final, atol=1e-5, what="final state")
        for name, truth in zip(delta_cases.NAMES, expected, strict=True):
            assert_close(grads[name], truth, atol=1e-5, rtol=1e-5, what=name)


def test_rows_of_zero_have_no_gradient_through_the_norm():
    """Hugging Face's norm passes 1000 times the cotangent at a zero row; ours passes nothing."""
    case = delta_cases.random_case(2, 1, 20, 1, 1, 8, 8)
    case.key[:, 5:9] = 0
    _, _, grads = evaluate(case, use_qk_l2norm=True, implementation="chunked")
    assert not np.asarray(grads["key"][:, 5:9]).any()
    assert np.isfinite(np.asarray(grads["query"])).all()
