"""Families: layers of one role and one shape, which may share a tensor."""

from __future__ import annotations

from collections.abc import Sequence

from lamina.network.sites import Site


def find_families(layers: Sequence[Site]) -> tuple[Site, ...]:
    """Return the families of two and more layers that are alike, in the order of their first.

    Alike are layers of one operation, shape, number of groups and geometry, all with a bias or all
    without. Linear layers must have one role too: the same path but for its numbers. Convolutions
    need not, for in a stage of a network every convolution of one shape does the same work.
    Embeddings, recurrent layers, tied and rigid ones are in no family.

    Example:
        >>> fc = [Site(f"blocks.{i}.fc", module=f"blocks.{i}.fc", shape=(4, 4)) for i in range(3)]
        >>> [(family.name, len(family.members)) for family in find_families(fc)]
        [('blocks.*.fc', 3)]
    """
    alike: dict[object, list[Site]] = {}
    for site in layers:
        if site.op in ("embedding", "recurrent") or site.aliases or site.rigid:
            continue
        if site.name != site.module:
            continue
        role = _role(site.name) if site.op == "linear" else ""
        geometry = (site.kernel, site.stride, site.padding, site.dilation, site.padding_mode)
        key = site.op, role, site.shape, site.groups, site.transposed, bool(site.bias), geometry
        alike.setdefault(key, []).append(site)
    found: list[Site] = []
    for members in alike.values():
        if len(members) > 1:
            name = _name([m.name for m in members], {f.name for f in found})
            found.append(_family(name, members))
    return tuple(found)


def _family(name: str, members: Sequence[Site]) -> Site:
    first = members[0]
    return Site(
        name,
        "family",
        op=first.op,
        shape=first.shape,
        groups=first.groups,
        transposed=first.transposed,
        kernel=first.kernel,
        stride=first.stride,
        padding=first.padding,
        dilation=first.dilation,
        padding_mode=first.padding_mode,
        positions=sum(m.positions for m in members),
        members=tuple(m.name for m in members),
    )


def _role(name: str) -> str:
    """Return a path with a star for every number: `blocks.3.fc1` -> `blocks.*.fc1`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _name(names: Sequence[str], taken: set[str]) -> str:
    """Return a name for layers: their path with a star where it differs, unlike those taken."""
    parts = [name.split(".") for name in names]
    if len({len(p) for p in parts}) == 1:
        shown = ".".join(p[0] if len(set(p)) == 1 else "*" for p in zip(*parts, strict=True))
    else:
        shown = f"{names[0]}, {names[-1]}"
    found, number = shown, 2
    while found in taken or found in names:
        found, number = f"{shown} ({number})", number + 1
    return found
