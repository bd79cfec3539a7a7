"""What the engine's work costs: the sizes of an adapter and its base, as the scheduler's prices want them."""

from engine.adapter import Adapter
from engine.base_model import BaseModel
from scheduler.cost import Prices


def prices_of(base: BaseModel, adapter: Adapter | None) -> Prices:
    """For whoever trains or applies this adapter; None is the base alone."""
    if adapter is None:
        return Prices(
            base_parameters=base.num_parameters,
            adapter_parameters=0,
            dense_parameters=0,
            routed_parameters=0,
            modules=0,
        )
    layout, config = adapter.layout, adapter.config
    num_experts, top_k = config.num_experts or 1, config.top_k or 1
    in_experts = sum(slot.stop - slot.start for slot in layout.slots.values() if slot.module in layout.expert_modules)
    return Prices(
        base_parameters=base.num_parameters,
        adapter_parameters=layout.size,
        dense_parameters=layout.size - in_experts,
        routed_parameters=in_experts * top_k // num_experts,
        modules=layout.num_pairs,
    )
