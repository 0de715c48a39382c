"""Real models on unlabelled inputs, watched at their linear modules."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files.configs import complete_config
from ..models.model import Model, Models
from ..spaces.layout import Layout
from .idle import Idle
from .inputs import Prepared
from .live import LiveModel, load_class
from .scores import pooled, prompts_in
from .skips import memory_names
from .taps import Call, Seen, Site, block_of, call_of, call_order, find_sites, observe
from .tokens import Batch

_TEXTS = ("input_ids", "attention_mask", "token_type_ids")
_INPUTS = ("pixel_values", *_TEXTS, "decoder_input_ids", "decoder_attention_mask")
# Which of the inputs says what is padding, by the tower whose tokens a module reads; images have none.
_MASKS = {"decoder": "decoder_attention_mask", "vision": None}


@dataclass(frozen=True)
class Probe:
    """A real model that is run on inputs.

    Attributes:
        module: the transformers class, in eval mode.
        sites: its linear modules, by canonical name of the weight.
        names: canonical tensor name -> name of the parameter in memory.
    """

    module: nn.Module
    sites: Mapping[str, Site]
    names: Mapping[str, str]

    def renamed(self, names: Mapping[str, str]) -> Probe:
        """The same with its sites and tensors under other names: new name -> the one it has here.

        Sites without a new name stay, under one that no tensor has.
        """
        rest = self.sites.keys() - set(names.values())
        renamed = {**names, **{f"{old} (unmatched)": old for old in sorted(rest)}}
        sites = {new: replace(self.sites[old], name=new) for new, old in renamed.items() if old in self.sites}
        return replace(
            self, sites=sites, names={new: self.names[old] for new, old in names.items() if old in self.names}
        )

    def see(self, batch: Batch, names: list[str]) -> dict[str, Seen]:
        """What these sites see; those that the inputs do not reach miss."""
        return observe(self.module, [self.sites[n] for n in names if n in self.sites], lambda: self.run(batch))

    def size_of(self, inputs: Prepared, names: list[str], budget: int = 2**30) -> int:
        """So many inputs at once that what these sites see of them takes no more than `budget` bytes."""
        longest = inputs.batch(torch.tensor([len(inputs) - 1]))
        seen = self.see(longest, names).values()
        one = sum(x.nbytes for each in seen for x in (each.x, each.y, each.carry) if x is not None)
        return max(1, min(inputs.batch_size, budget // max(one, 1)))

    def order(self, batch: Batch) -> list[list[str]]:
        """The sites that the inputs reach, in the order of the run; those with one input stand together."""
        return call_order(self.module, list(self.sites.values()), lambda: self.run(batch))

    def prompt_features(self, inputs: Prepared) -> Tensor | None:
        """Normalised features (prompts, width) of the prompts that come with inputs; None: there are none."""
        prompts = prompts_in(inputs.extra)
        if not prompts:
            return None
        with torch.no_grad():
            return nn.functional.normalize(pooled(self.run(prompts)), dim=-1)

    def run(self, batch: Batch) -> object:
        """Runs the model; of a model of two towers only the one that the inputs are for."""
        parameter = next(self.module.parameters())
        inputs: dict[str, Any] = {
            name: x.to(parameter.device, parameter.dtype if x.is_floating_point() else x.dtype)
            for name, x in batch.items()
            if name in _INPUTS
        }
        for wanted, method in (("pixel_values", "get_image_features"), ("input_ids", "get_text_features")):
            if wanted in inputs and hasattr(self.module, method):
                return getattr(self.module, method)(**inputs)
        if "use_cache" in inspect.signature(self.module.forward).parameters:
            inputs["use_cache"] = False  # one that a layer adds to would change what it does when it is called again
        return self.module(**inputs)


class Replay:
    """A probe that runs a layer from what it was called with before, not the whole model from the start.

    It holds the calls of one layer for all batches. What lies before that layer must not change meanwhile.
    """

    def __init__(self, probe: Probe):
        self.probe = probe
        self._block: str | None = None
        self._calls: dict[int, Call | None] = {}

    def see(self, number: int, batch: Batch, names: list[str]) -> dict[str, Seen]:
        """What these sites see of the batch of that number."""
        probe = self.probe
        sites = [probe.sites[name] for name in names]
        block = block_of(probe.module, sites)
        if block != self._block:
            self._block, self._calls = block, {}
        if block is None:
            return probe.see(batch, names)
        if number not in self._calls:
            self._calls[number] = call_of(probe.module, block, lambda: probe.run(batch))
        call, layer = self._calls[number], probe.module.get_submodule(block)
        return {} if call is None else observe(probe.module, sites, lambda: layer(*call.args, **call.kwargs))


def probe_of_model(model: Model, layout: Layout, device: str | torch.device, idle: Idle | None = None) -> Probe:
    """A model from its checkpoint; heads that its class has and the checkpoint has not do not matter.

    Args:
        model, layout: the model, and the layout of its tensors.
        device: where it is to run.
        idle: classes one of which may be filled instead of building another one.

    Raises:
        InputError: its class cannot be built here.
    """
    checkpoint = model.checkpoint
    if checkpoint.kind != "transformers":
        raise InputError(
            f"{checkpoint.location}: a checkpoint of kind {checkpoint.kind!r}; only models in the format of "
            "transformers are run on inputs. CLIPs of open_clip can be converted: transfuse convert"
        )
    state = {name: _single(checkpoint.tensor(name)) for name in checkpoint}
    module, loading = load_class(checkpoint.location, checkpoint.config, state, idle)
    if loading.mismatched:
        raise InputError(
            f"{checkpoint.location}: as {model.role} is seen here, {type(module).__name__} expects other shapes of "
            f"{', '.join(sorted(loading.mismatched)[:3])}: the config says otherwise than the tensors"
        )
    probe = _probe(module.to(device), layout, checkpoint.config)
    # What the class has and the checkpoint has not is drawn at random: nothing is to be learned from it.
    names = {name: memory for name, memory in probe.names.items() if memory not in loading.missing}
    sites = {name: site for name, site in probe.sites.items() if name in names}
    return replace(probe, sites=sites, names=names)


def probe_of_source(model: Model, models: Models, device: str | torch.device, idle: Idle | None = None) -> Probe:
    """Source or tuned, their sites and tensors under target's names.

    Raises:
        InputError: its class cannot be built here.
    """
    probe = probe_of_model(model, models.source_layout, device, idle)
    return probe if models.resizing is None else probe.renamed(models.resizing.names)


def probe_of_live(live: LiveModel, layout: Layout) -> Probe:
    """A model that was loaded already."""
    return _probe(live.model, layout, live.config)


def _probe(module: nn.Module, layout: Layout, config: Mapping[str, object]) -> Probe:
    names = memory_names(module, layout, complete_config(config))
    return Probe(module, find_sites(module, layout, names), names)


def _single(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x


def mask_of(batch: Batch, site: Site) -> Tensor | None:
    """(n, t), which of the tokens that enter a site are none of the padding; None: all of them."""
    name = _MASKS.get(site.reads, "attention_mask")
    return None if name is None else batch.get(name)


def rows_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """(n, t, d) -> (rows, d), padding left out; pooled (n, d) stays."""
    if x.ndim > 2 and mask is not None and mask.shape == x.shape[:2]:
        return x[mask.to(x.device).bool()]
    return x.flatten(0, -2)


def batches(inputs: Prepared, size: int | None = None) -> Iterator[Batch]:
    """The inputs without labels and prompts, `size` at once."""
    for batch in inputs.batches(size):
        yield {name: x for name, x in batch.items() if name not in ("labels", "columns", "prototypes")}
