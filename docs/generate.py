"""``python docs/generate.py``: what the pages in docs/methods/ say of the code, read from the code.

* below ``<!-- config: LoRAConfig -->`` a table of the configuration's fields;
* below ``<!-- methods -->`` a table of all methods, below ``<!-- families -->`` one of the pages;
* ``<page>.svg`` for each page: where in a model its methods sit.
"""

import dataclasses
import re
from pathlib import Path

import adapters
from adapters import AdapterConfig
from adapters.configuration import ADAPTER_CONFIG_MAP
from adapters.method import METHODS

PAGES = Path(__file__).parent / "methods"
MARKER = re.compile(r"(<!-- (config|methods|families)(?:: (\w+))? -->\n)(?:\n(?:\|[^\n]*\n)+)?")
Row = tuple[str, ...]


def main() -> None:
    """Write what has changed."""
    for path, text in generated().items():
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
            print(f"Written: {path}")


def generated() -> dict[Path, str]:
    """The content of every page and picture."""
    pages = {path: path.read_text("utf-8") for path in sorted(PAGES.glob("*.md"))}
    filled = {path: MARKER.sub(lambda match: match[1] + "\n" + _content(match[2], match[3]), text)
              for path, text in pages.items()}  # fmt: skip
    return filled | {PAGES / f"{family}.svg": picture(places) for family, places in PLACES.items()}


def _content(kind: str, name: str | None) -> str:
    match kind:
        case "config":
            return table(fields_of(getattr(adapters, str(name))))
        case "families":
            return table(families())
    return table(methods())


def families() -> list[Row]:
    """Every page with its picture."""
    pages = [path for path in sorted(PAGES.glob("*.md")) if path.name != "README.md"]
    titles = [path.read_text("utf-8").partition("\n")[0].lstrip("# ") for path in pages]
    rows = [
        (f"[{title}]({path.name})", f"![{title}]({path.stem}.svg)") for title, path in zip(titles, pages, strict=True)
    ]
    return [("family", "where it sits"), *rows]


def table(rows: list[Row]) -> str:
    """A Markdown table; the first row is the head."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def fields_of(config: type[AdapterConfig]) -> list[Row]:
    """Name, type and default of every field."""
    rows: list[Row] = [("field", "type", "default")]
    for field in dataclasses.fields(config):
        if field.name in ("architecture", "modules") or not field.init:  # the latter has every configuration
            continue
        made = field.default_factory is not dataclasses.MISSING
        value = field.default_factory() if made else field.default
        default = "required" if value is dataclasses.MISSING else f"`{value!r}`"
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        rows.append((f"`{field.name}`", f"`{kind}`", default))
    return rows


def methods() -> list[Row]:
    """Every module class: its formula, configuration, identifiers, site, whether it merges, and its page."""
    rows: list[Row] = [("method", "formula", "configuration", "site", "merges")]
    for config, modules in METHODS.items():
        for module in modules:
            if not module.__module__.startswith("adapters."):
                continue  # made by a script
            lines = (module.__doc__ or "").strip().splitlines()
            merges = re.search(r"Merges: (\w+)", module.__doc__ or "")
            page = page_of(config.__name__)
            name = f"[{module.__name__}]({page})" if page else module.__name__
            names = ", ".join(f"`{name}`" for name in identifiers(config, module))
            text = f"`{config.__name__}` {names}".strip()
            rows.append(
                (name, f"`{lines[0].rstrip('.')}`", text, module.site_type.__name__, merges[1] if merges else "no")
            )
    return [rows[0], *sorted(rows[1:], key=lambda row: row[0].lower().lstrip("["))]


def identifiers(config: type[AdapterConfig], module: type) -> list[str]:
    """The names of the configurations of a module's own file; the first module has those that no file claims."""
    known = {name: known for name, known in ADAPTER_CONFIG_MAP.items() if isinstance(known, config)}
    homes = {other.__module__ for other in METHODS[config]}
    first = METHODS[config][0] is module
    return [
        name
        for name, made in known.items()
        if (home := type(made).__module__) == module.__module__ or (first and home not in homes)
    ]


def page_of(config: str) -> str | None:
    """The page that has the table of a configuration."""
    pages = [
        path.name for path in sorted(PAGES.glob("*.md")) if f"<!-- config: {config} -->" in path.read_text("utf-8")
    ]
    return pages[0] if pages else None


# --- pictures --------------------------------------------------------------------------------------------------------

# What of a block is drawn: the text, left, top, width. The main line runs from the embeddings up to the output.
BOXES = {
    "embedding": ("embeddings", 90, 350, 180),
    "prompt": ("prompt tokens", 290, 350, 130),
    "q": ("q", 90, 290, 54),
    "k": ("k", 153, 290, 54),
    "v": ("v", 216, 290, 54),
    "prefix": ("prefix k, v", 290, 245, 130),
    "attention": ("attention", 90, 245, 180),
    "o": ("o", 90, 205, 180),
    "after attention": ("sub-layer output", 290, 205, 130),
    "norm": ("add, norm", 90, 165, 180),
    "intermediate": ("feed-forward 1", 90, 120, 180),
    "output": ("feed-forward 2", 90, 80, 180),
    "after feed-forward": ("sub-layer output", 290, 80, 130),
    "norm 2": ("add, norm", 90, 40, 180),
    "stream": ("block output", 290, 40, 130),
}
EXTRAS = ("prompt", "prefix", "after attention", "after feed-forward", "stream")
LINEAR = ("q", "k", "v", "o", "intermediate", "output")
PLACES = {
    "bottleneck": ("after attention", "after feed-forward"),
    "compacter": ("after attention", "after feed-forward"),
    "invertible": ("embedding",),
    "lora": LINEAR,
    "lora-family": LINEAR,
    "prefix-and-prompt": ("prefix", "prompt"),
    "reft": ("stream",),
    "orthogonal": LINEAR,
    "other-low-rank": LINEAR,
    "small": ("norm", "norm 2", "embedding", *LINEAR),
}


def picture(places: tuple[str, ...]) -> str:
    """A block of a model with `places` marked."""
    boxes = [_box(key, key in places) for key in BOXES if key in places or key not in EXTRAS]
    line = '<path d="M180 350V28" stroke="#888" stroke-width="2" fill="none"/>'
    return "\n".join([
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="70 15 370 375" width="370" height="375"'
        ' font-family="sans-serif" font-size="13" text-anchor="middle">',
        f"<title>Where it sits: {', '.join(places)}</title>",
        line,
        *boxes,
        "</svg>\n",
    ])  # fmt: skip


def _box(key: str, marked: bool) -> str:
    text, left, top, width = BOXES[key]
    fill, edge = ("#ffd9a8", "#d9730d") if marked else ("#f4f4f4", "#999")
    link = f'<path d="M270 {top + 13}H{left}" stroke="{edge}"/>' if key in EXTRAS else ""
    return (
        f'{link}<rect x="{left}" y="{top}" width="{width}" height="26" rx="4" fill="{fill}" stroke="{edge}"/>'
        f'<text x="{left + width // 2}" y="{top + 18}">{text}</text>'
    )


if __name__ == "__main__":
    main()
