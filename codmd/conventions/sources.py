"""The code that each convention was checked against: repository, path, function, and the date of that version."""

from __future__ import annotations

from typing import NamedTuple


class Source(NamedTuple):
    """One public implementation: ``date`` is the day of ``commit``, ISO, or a bound where no more is known."""

    repository: str
    path: str
    function: str
    date: str
    commit: str

    @property
    def url(self) -> str:
        """The file at that commit."""
        return f"https://github.com/{self.repository}/blob/{self.commit}/{self.path}"


_LIGHTX2V = "ModelTC/LightX2V", "lightx2v_train/lightx2v_train/trainers/dmd/math.py"
_FASTVIDEO = "hao-ai-lab/FastVideo"
_FASTVIDEO_METHODS = "fastvideo/train/methods/distribution_matching"
_RCM = "rcm/models/t2v_model_distill_rcm.py"

SOURCES: dict[str, Source] = {
    "causvid": Source("tianweiy/CausVid", "causvid/dmd.py", "_compute_kl_grad", "2025-05-17", "ca21150"),
    "self_forcing": Source("guandeh17/Self-Forcing", "model/dmd.py", "_compute_kl_grad", "2025-09-11", "33593df"),
    "codmd": Source("JIA-Lab-research/CoDMD", "copula_dmd/dmd.py", "_compute_kl_grad", "2026-07-15", "6a8259b"),
    "helios": Source(
        "PKU-YuanGroup/Helios", "helios/utils/utils_helios_post.py", "compute_kl_grad", "2026-04-02", "2276f8f"
    ),
    "reward_forcing": Source(
        "JaydenLyh/Reward-Forcing", "model/re_dmd.py", "_compute_kl_grad", "2025-12-15", "4317f5a"
    ),
    "longlive": Source("NVlabs/LongLive", "model/dmd.py", "_compute_kl_grad", "2026-08-07", "7860ad9"),
    "one_forcing": Source("Aurora-edu/One-Forcing", "model/dmd.py", "_compute_kl_grad", "2026-06-01", "ca345b3"),
    "dmd2": Source(
        "tianweiy/DMD2", "main/sd_guidance.py", "compute_distribution_matching_loss", "2025-03-05", "8d8fa55"
    ),
    "dmdr": Source(
        "vvvvvjdy/dmdr", "train_cc/sit/train_sitxl_refl_deepspeed.py", "the training loop", "2025-12-06", "061dc29"
    ),
    "rcm": Source("NVlabs/rcm", _RCM, "_student_dmd_step", "2026-05-17", "5b41aa9"),
    "turbodiffusion": Source(
        "thu-ml/TurboDiffusion", f"turbodiffusion/{_RCM}", "_student_dmd_step", "2026-07-16", "aaecff5"
    ),
    "rcm_2025": Source("NVlabs/rcm", _RCM, "training_step_generator", "2025-11-27", "97578b7"),
    "cosmos": Source(
        "lbai-6721/wm-cosmos-predict2.5", "cosmos_predict2/_src/interactive/methods/distribution_matching/dmd2.py",
        "training_step_generator", "2026-04-13", "2c4faf2",
    ),
    "fastgen": Source(
        "NVlabs/FastGen", "fastgen/methods/common_loss.py", "variational_score_distillation_loss", "2026-02-25",
        "34f30e8",
    ),
    "modelopt": Source(
        "NVIDIA/Model-Optimizer", "modelopt/torch/fastgen/losses.py", "vsd_loss", "2026-08-21", "a2fbac7ba"
    ),
    "fastvideo": Source(
        _FASTVIDEO, f"{_FASTVIDEO_METHODS}/dmd2.py", "_dmd_loss", "2026-08-21", "2f3d40740"
    ),
    "fastvideo_legacy": Source(
        _FASTVIDEO, "fastvideo/training/distillation_pipeline.py", "_dmd_forward", "2026-08-21", "2f3d40740"
    ),
    "fastvideo_streaming": Source(
        _FASTVIDEO, f"{_FASTVIDEO_METHODS}/streaming_long_tuning.py", "_dmd_loss_masked", "2026-08-21", "2f3d40740"
    ),
    "lightx2v": Source(*_LIGHTX2V, "dmd_loss_with_stats", "after 2026-07-30", "1f0992f"),
    "lightx2v_legacy": Source(*_LIGHTX2V, "dmd_loss", "2026-08-21", "f8aee98b"),
    "lightx2v_pdmd": Source(*_LIGHTX2V, "official_pdmd_loss_with_stats", "after 2026-07-30", "9aa6765"),
    "videox_fun": Source(
        "aigc-apps/VideoX-Fun", "scripts/wan2.1/train_distill.py", "the training loop", "2026-05-12", "804a425"
    ),
    "videox_fun_z_image": Source(
        "aigc-apps/VideoX-Fun", "scripts/z_image/train_distill.py", "the training loop", "2026-05-12", "804a425"
    ),
    "diffsynth": Source(
        "modelscope/DiffSynth-Studio", "diffsynth/diffusion/dmd2.py", "_variational_score_distillation_loss",
        "2026-08-20", "fed7b18f",
    ),
    "simpletuner": Source(
        "bghira/SimpleTuner", "simpletuner/helpers/distillation/dmd/distiller.py", "_compute_kl_grad", "2026-08-22",
        "bc8e6ab77",
    ),
    "tdm": Source("Luo-Yihong/TDM", "train_tdm_demo.py", "the training loop", "2026-03-17", "81b019f"),
}  # fmt: skip
