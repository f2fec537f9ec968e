"""Carry out all checks of a run before it starts. Trains nothing, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtrain.config import Config
from jaxtrain.config.rules import validate
from jaxtrain.mesh import count_devices, describe_mesh, make_mesh
from jaxtrain.preflight import attention, copies, data, devices, experts, float8, folders, hosts, links
from jaxtrain.preflight.checks import Check, Finding, Site, carry_out
from jaxtrain.processes import barrier
from jaxtrain.telemetry.heartbeat import Heartbeat


def examine(config: Config, patience: float, heartbeat: Heartbeat | None = None) -> tuple[Site, list[Finding]]:
    """Carry out all checks; return the site and the findings. Checks that would hang or mislead after a failure are skipped.

    Args:
      patience: limit in seconds for one check.

    Raises:
      ConfigError: the config does not fit the devices.
    """
    site, findings = Site(config), []

    def carry(checks: list[Check]) -> bool:
        """Return whether none of them failed."""
        new = []
        for check in checks:
            if any(finding.state == "failed" for finding in new):
                new.append(Finding(check.name, "skipped", "after the failure above"))
            else:
                new += carry_out(check, site, patience, heartbeat)
        findings.extend(new)
        return all(finding.state != "failed" for finding in new)

    with site.closing:
        software, same_config, clocks = hosts.checks()
        same = [carry([software]), carry([same_config])]  # both touch no device
        if not all(same):
            findings.append(Finding("all else", "skipped", "processes that differ may wait for one another for ever"))
            return site, findings
        carry([clocks])
        site.config = validate(config, count_devices())
        site.mesh = make_mesh(site.config.mesh)
        carry(folders.checks())
        for check in (
            *copies.checks(site.config),
            *devices.checks(),
            *attention.checks(site),
            *float8.checks(site),
            *links.checks(site),
            *experts.checks(site),
            *data.checks(),
        ):
            carry([check])
        barrier("preflight end", patience)  # no process cleans up before all have checked
    return site, findings


def where(site: Site) -> str:
    """Describe the mesh and the processes."""
    mesh = describe_mesh(site.mesh) if site.mesh is not None else "no mesh"
    processes = f"{len(site.hosts)} processes on {len(set(site.hosts))} host(s)" if len(site.hosts) > 1 else "one process"
    return f"{mesh}, {processes}"


def verdict(findings: Sequence[Finding]) -> str:
    """Return the result in one line."""
    failed = sorted({finding.check for finding in findings if finding.state == "failed"})
    warned = sorted({finding.check for finding in findings if finding.state == "warning"})
    if failed:
        return f"this run would fail: {', '.join(failed)}"
    return "nothing stands in the way" + (f"; look at: {', '.join(warned)}" if warned else "")
