"""The three losses on random latents: `python examples/losses.py` (CPU, seconds)."""

import torch

import codmd

torch.manual_seed(0)
# Latents [samples, frames, channels, height, width]: of the student, and the teacher's and the critic's x0 predictions.
student, noise, shift = torch.randn(3, 2, 5, 16, 12, 20)
real, real_uncond, fake = student + 0.1 * noise, student + 0.2 * shift, student - 0.1 * noise
student.requires_grad_()

relation = codmd.ops.relation_loss(student, real, fake)
dmd = codmd.ops.dmd_loss(student, real=real, fake=fake, real_uncond=real_uncond, guidance=3.5)
terms = codmd.ops.codmd_loss(
    student, real=real, fake=fake, real_uncond=real_uncond, guidance=3.5, relation_weight=0.1, return_terms=True
)
terms.total.backward()
print(f"relation {relation:.3g}, of the unguided predictions; DMD {dmd:.3g}")
print(f"CoDMD {terms.total:.3g} = DMD {terms.dmd:.3g} + 0.1 (batch {terms.batch:.3g} + frame {terms.frame:.3g})")
print(f"gradient {tuple(student.grad.shape)} of norm {student.grad.norm():.3g}")
print(f"frame relations of the first sample:\n{codmd.ops.relation_matrix(student.detach())[0]}")
