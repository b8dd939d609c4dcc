"""The planted bugs: every rule of the protocol has a switch, and a way in which its absence is noticed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dht.domain.rules import DomainRules
from dht.register.rules import Rules
from dht.sim.scenario import Scenario


def switched_off(scenario: Scenario, off: Sequence[str]) -> Scenario:
    """The same with these rules, of the registers or of the domain, switched off. Raises ValueError for others."""
    registers, domain = Rules.__struct_fields__, DomainRules.__struct_fields__
    for rule in off:
        if rule not in (*registers, *domain):
            raise ValueError(f"there is no rule {rule!r}; rules: {', '.join((*registers, *domain))}")
    return replace(
        scenario,
        rules=scenario.rules + tuple(rule for rule in off if rule in registers),
        domain_rules=scenario.domain_rules + tuple(rule for rule in off if rule in domain),
    )
