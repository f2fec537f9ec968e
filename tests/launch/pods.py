"""What Kubernetes makes of a manifest, as far as a process of ours can tell: a simulation, since no cluster is at hand."""

from __future__ import annotations

import re
from typing import Any


def environment_of_pod(container: dict[str, Any], index: int, address: str = "10.0.0.{}") -> dict[str, str]:
    """What a container sees: values, fields of the pod, earlier variables put in for $(NAME)."""
    fields = {"status.podIP": address.format(index)}
    seen = {"JOB_COMPLETION_INDEX": str(index), "KUBERNETES_SERVICE_HOST": "10.96.0.1"}
    for variable in container["env"]:
        value = variable.get("value")
        if value is None and "fieldRef" in variable["valueFrom"]:
            value = fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        if value is not None:
            put_in = re.sub(r"(?<!\$)\$\((\w+)\)", lambda match: seen[match[1]], value)
            seen[variable["name"]] = put_in.replace("$$(", "$(")
    return seen


def action(rules: list[dict[str, Any]], code: int) -> tuple[int | None, str]:
    """What the first rule that matches an exit code does, and its place."""
    for place, rule in enumerate(rules):
        if code in rule.get("onExitCodes", {}).get("values", ()):
            return place, rule["action"]
    return None, "Count"
