"""What several test files share: the golden models, and the folder of real texts where there is one."""
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(min(2, torch.get_num_threads()))
GOLDEN = Path(__file__).parent / "golden"


def golden_model(name):
    "One of the tiny random models that the official code was run on, float32."
    from transformers import AutoConfig, AutoModelForCausalLM
    raw = json.loads((GOLDEN / "models" / f"{name}.config.json").read_text())
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    model = AutoModelForCausalLM.from_config(config)
    state = {k: v.float() for k, v in load_file(GOLDEN / "models" / f"{name}.safetensors").items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("rotary" in k for k in missing), (missing, unexpected)
    return model.eval()


def golden_cases(method):
    "(case name, its manifest entry) for each case of a method."
    return sorted(json.loads((GOLDEN / method / "manifest.json").read_text())["cases"].items())


@pytest.fixture(scope="session")
def assets():
    "The folder that LCNB_ASSETS names, or skip."
    folder = os.environ.get("LCNB_ASSETS")
    if not folder or not Path(folder).is_dir(): pytest.skip("LCNB_ASSETS names no folder")
    return Path(folder)
