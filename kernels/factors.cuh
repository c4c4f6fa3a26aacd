// The scalars of an update, which prepare_update (adamw.cu) computes and every kernel that changes
// weights reads. `Factors` in gpu_gpt2/ops/table.py is the same in Python.

struct Factors {
    float apply;        // 1, or 0 if the step makes no update: then nothing changes
    float grad_factor;  // min(1, max_norm / norm) / loss_scale
    float lr;           // learning rate
    float c1;           // 1 - beta1^t
    float c2;           // 1 - beta2^t
};
