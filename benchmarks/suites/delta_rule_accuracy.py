"""Relative errors of the gated delta rule on inputs that break chunked forms, beside Hugging Face's PyTorch."""

import numpy as np

from tests.support import delta_cases
from tests.support.compare import relative_error
from tests.support.delta_properties import evaluate

TESTS = ["tests/delta_rule/test_truth.py"]


def measure(quick: bool) -> list[dict]:
    """One row per input: errors of output, final state and gradients against a float64 recurrence."""
    import torch
    from transformers.models.qwen3_next import modeling_qwen3_next

    rows = []
    lengths = (65,) if quick else (512, 2049)
    cases = [item for length in lengths for item in delta_cases.nasty_cases(0, length).items()]
    for name, case in cases:
        out, final, grads = delta_cases.recurrence(case)
        exact = {"out": out, "final_state": final, **grads}
        our_out, our_final, our_grads = evaluate(case, implementation="chunked")
        ours = {"out": our_out, "final_state": our_final, **our_grads}

        inputs = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in case.operands]
        query, key = (x.repeat_interleave(2, dim=2) for x in inputs[:2])
        out, final = modeling_qwen3_next.torch_chunk_gated_delta_rule(
            query, key, *inputs[2:5], initial_state=inputs[5], output_final_state=True
        )
        cotangents = [torch.tensor(x, dtype=torch.float32) for x in (case.d_out, case.d_final)]
        gradients = torch.autograd.grad([out, final], inputs, cotangents)
        theirs = {"out": out, "final_state": final}
        theirs |= dict(zip(delta_cases.NAMES, gradients, strict=True))
        errors = {
            what: {side: relative_error(got[what], exact[what]) for side, got in sides}
            for sides in [(("ours", ours), ("hugging face", theirs))]
            for what in exact
        }
        rows.append({"inputs": name, "length": int(np.shape(case.g)[1]), "relative_error": errors})
    return rows
