"""What the engine's work costs: the sizes of an adapter and its base, as the scheduler's prices want them."""

from engine.adapter import Adapter
from engine.base_model import BaseModel
from scheduler.cost import Prices


def prices_of(base: BaseModel, adapter: Adapter | None) -> Prices:
    """For whoever trains or applies this adapter; None is the base alone."""
    if adapter is None:
        return Prices(base_parameters=base.num_parameters, adapter_parameters=0, active_parameters=0, modules=0)
    layout, config = adapter.layout, adapter.config
    num_experts, top_k = config.num_experts or 1, config.top_k or 1
    in_experts = sum(slot.stop - slot.start for slot in layout.slots.values() if slot.module in layout.expert_modules)
    pairs = [slot.module for slot in layout.slots.values() if slot.matrix == "A"]
    return Prices(
        base_parameters=base.num_parameters,
        adapter_parameters=layout.size,
        active_parameters=layout.size - in_experts + in_experts * top_k // num_experts,
        modules=sum(num_experts if module in layout.expert_modules else 1 for module in pairs),
    )
