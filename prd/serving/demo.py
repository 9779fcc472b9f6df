"""The page of `prd demo` (Gradio): a prompt becomes variants to choose from, seen in a viewer, in every format."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from fastapi import FastAPI, HTTPException

from prd.hub.cards import PROMPT
from prd.hub.shipped import about
from prd.serving.demo_actions import MAX_VARIANTS, Actions
from prd.serving.requests import available_formats
from prd.serving.server import build_app
from prd.serving.service import Service

CSS = """
footer {display: none !important}
#sheet .caption-label {font-size: .75rem}
"""
AT_ONCE = 64  # clicks that are being answered; further ones wait


def build_demo(service: Service, hosts: Collection[str] | None = None) -> FastAPI:
    """Return the application of the page, and of `prd serve` beside it; the service's model must be loaded.

    hosts  as of `build_app`
    """
    shown = service.jobs.folder / "shown"  # files as browsers are given them, removed with the others
    os.environ["GRADIO_TEMP_DIR"] = str(shown)
    blocks = build_page(service)
    fonts = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # the theme's own come from the network
    theme = gr.themes.Soft(primary_hue="indigo", font=fonts[0], font_mono=fonts[1])
    app = build_app(service, hosts=hosts)
    app.add_api_route("/gradio_api/upload{rest:path}", _refuse_upload, methods=["GET", "POST"], include_in_schema=False)
    return gr.mount_gradio_app(
        app, blocks, path="/", theme=theme, css=CSS, ssr_mode=False, footer_links=[], run_history=False, pwa=False
    )


def _refuse_upload() -> None:
    """Answer Gradio's door for files, which the page has no use for and any site could fill the disk through."""
    raise HTTPException(404)


def build_page(service: Service) -> gr.Blocks:
    """Return the page: what is asked for on the left, what came of it on the right."""
    pipe, actions = service.pipe, Actions(service)
    keep = int(service.config.keep)
    with gr.Blocks(title="prd", analytics_enabled=False, delete_cache=(60, keep), fill_width=True) as page:
        gr.Markdown(f"# A sentence becomes a mesh\n{_about_model(pipe)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                inputs, button = _inputs(pipe, service.config.limits.resolution)
            with gr.Column(scale=3, min_width=420):
                viewer = gr.Model3D(
                    label="Mesh", height=420, interactive=False, elem_id="viewer", clear_color=(0.93, 0.94, 0.96, 1.0)
                )
                status = gr.Textbox(
                    label="Status", value="Type a prompt and click Generate.", interactive=False, elem_id="status"
                )
                with gr.Row(elem_id="downloads"):
                    downloads = [
                        gr.DownloadButton(f".{name}", size="sm", min_width=60, interactive=False, elem_id=f"as-{name}")
                        for name in available_formats()
                    ]
                gr.Markdown("Made so far, the newest first. Click one to see it:")
                sheet = gr.Gallery(
                    show_label=False,
                    columns=6,
                    fit_columns=False,
                    height=260,
                    object_fit="contain",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="sheet",
                )
        gr.on(
            [button.click, inputs["prompt"].submit, inputs["share"].release],
            actions.make,
            list(inputs.values()),
            [status, sheet, viewer, *downloads],
            trigger_mode="multiple",  # every click is answered, also those while one is
            concurrency_limit=AT_ONCE,
            show_progress="full",
            show_progress_on=status,
            api_name="make",
        )
        sheet.select(
            actions.choose, None, [status, viewer, *downloads], show_progress="hidden", api_visibility="private"
        )
    return page.queue(max_size=1024)


def _inputs(pipe: Any, resolution: int) -> tuple[dict[str, Any], gr.Button]:
    """Add what is asked for; returns the fields in the order of the arguments of `Actions.make`, and the button."""
    draws, interpolates = bool(pipe.draws_noise), hasattr(pipe, "interpolate")
    fields: dict[str, Any] = {}
    fields["prompt"] = gr.Textbox(label="Prompt", placeholder=_examples(pipe)[0], max_lines=3, elem_id="prompt")
    with gr.Row(visible=draws):
        fields["seed"] = gr.Textbox(label="Seed", placeholder="empty: a new one", elem_id="seed")
        fields["variants"] = gr.Slider(1, MAX_VARIANTS, 1, step=1, label="Variants", elem_id="variants")
    with gr.Group(visible=interpolates):
        fields["toward"] = gr.Textbox(label="Second prompt, to go between the two", elem_id="toward")
        fields["share"] = gr.Slider(0, 1, 0.5, step=0.05, label="Share of the second", elem_id="share")
    with gr.Accordion("Options", open=False):
        fields["faces"] = gr.Slider(100, 50_000, 10_000, step=100, label="Triangles", elem_id="faces")
        fields["colors"] = gr.Radio(["texture", "per vertex"], value="texture", label="Colours")
        fields["resolution"] = gr.Slider(
            32 if resolution > 32 else 2,
            resolution,
            min(160, resolution),
            step=1,
            label="Nodes per axis of the surface",
        )
    button = gr.Button("Generate", variant="primary", elem_id="generate")
    gr.Examples([[text] for text in _examples(pipe)], [fields["prompt"]], cache_examples=False)
    if words := about(pipe.encoder_name).get("vocabulary"):
        with gr.Accordion("Words this model knows", open=False):
            gr.Markdown(", ".join(words))
    return fields, button


def _examples(pipe: Any) -> list[str]:
    """Return prompts that the model can make something of."""
    known = about(pipe.encoder_name)
    first = known.get("prompt" if pipe.draws_noise else "single_pass_prompt", PROMPT)
    return list(dict.fromkeys([first, *known.get("examples", [])]))


def _about_model(pipe: Any) -> str:
    made = pipe.metadata("")
    drawn = "the seed draws one of many" if pipe.draws_noise else "one mesh per prompt, in one pass"
    return f"Model **{made['model']}** ({type(pipe).__name__}; {drawn}). What it makes is under: {made['licence']}."
