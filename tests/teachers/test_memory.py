"""What keeps memory low: recomputation block by block, texts in main memory; none of it changes a number."""

from dataclasses import replace

import pytest
import torch

from prd.loading.stable_diffusion import load_base
from prd.training.parts import share_texts
from tests.teachers.tiny import TEACHERS, random_views, save_teacher, tiny_teacher


@pytest.mark.parametrize("kind", ["stable_diffusion", "mvdream"])
def test_the_encoder_is_recomputed_block_by_block_to_the_same_gradient(tmp_path, kind):
    folder = save_teacher(tmp_path, kind)
    gradients, runs, kept = [], [], []
    for recompute in (False, True):
        teacher = TEACHERS[kind].from_pretrained(folder, checkpoint_vae=recompute)
        blocks = [*teacher.vae.encoder.down_blocks, teacher.vae.encoder.mid_block]
        order: list[int] = []
        for i, block in enumerate(blocks):
            forward = block.forward

            def counted(*args, i=i, order=order, forward=forward, **words):
                order.append(i)
                return forward(*args, **words)

            block.forward = counted
        views = random_views(1, teacher.num_views)
        rgb, saved = views.rgb.clone().requires_grad_(), []
        noise = torch.randn(teacher.num_views, *teacher.input_shape, generator=torch.Generator().manual_seed(3))
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            x = teacher.encode(replace(views, rgb=rgb), noise=noise)
        gradients += torch.autograd.grad(x.square().sum(), rgb)
        runs.append(order)
        kept.append(sum(saved))
    assert runs == [[0, 1, 2], [0, 1, 2, 2, 1, 0]]  # recomputed from the last to the first, each when it is needed
    assert kept[1] < kept[0] / 2
    torch.testing.assert_close(*gradients, atol=0, rtol=0)


def test_texts_are_remembered_in_main_memory_and_handed_out_where_the_encoder_is(tmp_path):
    teacher = tiny_teacher(tmp_path, "stable_diffusion")
    encoder = teacher.prompt_encoder
    expected = encoder(["a", "b"])
    encoder.encoded.clear()
    teacher.text_encoder.to("meta")  # a device that is not the CPU, on any machine
    rows, asked = expected.clone(), []

    class Elsewhere(torch.Tensor):
        """A tensor that is asked to come to the CPU."""

        def cpu(self, *_, **__):
            asked.append(len(self))
            return rows

    encoder.encode = lambda prompts: rows.as_subclass(Elsewhere)
    out = encoder(["a", "b"])
    assert asked == [2] and out.device.type == "meta"
    assert all(row.device.type == "cpu" for row in encoder.encoded.values())
    torch.testing.assert_close(torch.stack([*encoder.encoded.values()]), expected)


@pytest.mark.gpu
def test_no_text_stays_on_a_gpu(tmp_path):
    teacher = tiny_teacher(tmp_path, "stable_diffusion").to("cuda")
    assert teacher.prompt_encoder(["a"]).is_cuda
    assert not any(row.is_cuda for row in teacher.prompt_encoder.encoded.values())


def test_teachers_of_one_text_encoder_share_it(tmp_path):
    first, same, other = (
        TEACHERS[kind].from_pretrained(save_teacher(tmp_path / str(i), kind, seed=i // 2))
        for i, kind in enumerate(("stable_diffusion", "stable_diffusion", "mvdream"))
    )
    own = other.prompt_encoder
    expected = same.prompt_encoder(["a"])
    share_texts([first, same, other])
    assert same.prompt_encoder is first.prompt_encoder and same.text_encoder is first.text_encoder
    assert other.prompt_encoder is own and other.text_encoder is own.model
    torch.testing.assert_close(same.prompt_encoder(["a"]), expected, atol=0, rtol=0)


def test_the_pooled_embedding_is_the_text_encoders_own(tmp_path):
    encoder = load_base("toybox", text=True).encoder
    prompts = ["a red cube", "a yellow sphere on a purple cube", "", "a cube " * 50]  # the last one is cut
    embeds = encoder(prompts)
    expected = encoder.model(encoder._tokens(prompts).input_ids).pooler_output
    torch.testing.assert_close(encoder.pooled(prompts, embeds), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, embeds.mean(dim=1), atol=1e-2)
