"""How the page looks: Gradio's theme, mapped onto the tokens of page.css.

The fonts are those bundled with Gradio, so the page loads nothing from other servers. Only the regular and bold Plex
files contain the Latin letters.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from comparator.reporting.set_matrix import TEMPLATES

_HERE = Path(__file__).parent
PAPER, PAPER_DARK = "#f6f6f3", "#131417"

ICON = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 24 24'><rect x='2' y='3' width='5' height='18' rx='1.5' "
    "fill='#6f7681'/><rect x='9.5' y='9' width='5' height='12' rx='1.5' fill='#0072b2'/><rect x='17' y='14' "
    "width='5' height='7' rx='1.5' fill='#d55e00'/></svg>"
)


def theme() -> gr.themes.Base:
    """Gradio's variables, pointed at the page's own tokens; light and dark differ only in the tokens."""
    base = gr.themes.Base(
        font=(gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"),
        font_mono=(gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "monospace"),
        radius_size=gr.themes.sizes.radius_sm,
        spacing_size=gr.themes.sizes.spacing_sm,
        text_size=gr.themes.sizes.text_sm,
    )
    tokens = {
        "body_text_color": "var(--ink)",
        "body_text_color_subdued": "var(--soft)",
        "background_fill_primary": "var(--card)",
        "background_fill_secondary": "var(--paper)",
        "border_color_primary": "var(--line)",
        "border_color_accent": "var(--line-strong)",
        "border_color_accent_subdued": "var(--line)",
        "color_accent": "var(--ink)",
        "color_accent_soft": "var(--hover)",
        "block_background_fill": "transparent",
        "block_border_color": "transparent",
        "block_border_width": "0px",
        "block_label_background_fill": "transparent",
        "block_label_text_color": "var(--soft)",
        "block_title_text_color": "var(--soft)",
        "block_info_text_color": "var(--soft)",
        "block_shadow": "none",
        "input_background_fill": "var(--card)",
        "input_background_fill_focus": "var(--card)",
        "input_border_color": "var(--line-strong)",
        "input_border_color_focus": "var(--focus)",
        "input_border_width": "1px",
        "input_shadow": "none",
        "input_shadow_focus": "0 0 0 2px var(--focus-ring)",
        "input_placeholder_color": "var(--soft)",
        "checkbox_background_color": "var(--card)",
        "checkbox_background_color_selected": "var(--ink)",
        "checkbox_border_color": "var(--control)",
        "checkbox_border_color_selected": "var(--ink)",
        "checkbox_label_background_fill": "transparent",
        "checkbox_label_background_fill_hover": "transparent",
        "checkbox_label_background_fill_selected": "transparent",
        "checkbox_label_border_color": "transparent",
        "checkbox_label_text_color": "var(--ink)",
        "checkbox_label_text_color_selected": "var(--ink)",
        "button_primary_background_fill": "var(--ink)",
        "button_primary_background_fill_hover": "var(--ink-hover)",
        "button_primary_text_color": "var(--paper)",
        "button_primary_text_color_hover": "var(--paper)",
        "button_primary_border_color": "var(--ink)",
        "button_secondary_background_fill": "var(--card)",
        "button_secondary_background_fill_hover": "var(--hover)",
        "button_secondary_text_color": "var(--ink)",
        "button_secondary_border_color": "var(--line-strong)",
        "panel_background_fill": "transparent",
        "panel_border_color": "var(--line)",
        "table_border_color": "var(--line)",
        "link_text_color": "var(--link)",
        "link_text_color_hover": "var(--link)",
        "link_text_color_visited": "var(--link)",
        "error_background_fill": "var(--card)",
        "error_text_color": "var(--ink)",
        "error_border_color": "var(--bad)",
        "error_icon_color": "var(--bad)",
    }
    dark = {f"{name}_dark": value for name, value in tokens.items() if hasattr(base, f"{name}_dark")}
    return base.set(
        **tokens,
        **dark,
        body_background_fill=PAPER,
        body_background_fill_dark=PAPER_DARK,
        button_border_width="1px",
        input_radius="7px",
        block_radius="7px",
        container_radius="7px",
        button_large_radius="7px",
        button_medium_radius="7px",
        button_small_radius="7px",
        checkbox_border_width="1px",
    )


def appearance() -> dict:
    """Keyword arguments for `launch`: theme, style sheet and the page's little script.

    The style sheet goes into the head, because Gradio rewrites `css`: it prefixes every selector with its own class,
    which breaks selectors that begin at the body or contain a comma.
    """
    script = "\n".join(
        (_HERE / name).read_text(encoding="utf-8")
        for name in ("page.js", "plots.js", "columns.js", "tree.js", "recordings.js", "votes.js")
    )
    style = "\n".join(
        path.read_text(encoding="utf-8")
        for path in (
            *(
                _HERE / name
                for name in (
                    "page.css",
                    "fidelity.css",
                    "prompt_set.css",
                    "columns.css",
                    "tree.css",
                    "recordings.css",
                    "train.css",
                    "votes.css",
                )
            ),
            TEMPLATES / "prompt_set.css",
        )
    )
    icon = ICON.replace("#", "%23")
    return {
        "theme": theme(),
        "head": f'<link rel="icon" href="data:image/svg+xml,{icon}"><style>{style}</style><script>{script}</script>',
    }
