"""What every test needs: no network, one thread, no chatter."""

from __future__ import annotations

import os

import pytest

# Before the first import of huggingface_hub and transformers, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"

import torch
import transformers

pytest.register_assert_rewrite("layout_checks")
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
