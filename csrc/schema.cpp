// Every op of the library: its schema, and in a line what it does. The page to open first.
//
// bindings/<stem>.cpp implements an op for each device; python/fastkit/ops/<stem>.py checks its arguments,
// chooses the implementation and differentiates.
#include <torch/csrc/stable/library.h>

#include <string>

#include "common/isa.h"
#include "fastkit/device.h"

namespace {

std::string quoted(const char* text) { return '"' + std::string(text) + '"'; }

// What this library is, as JSON; python/fastkit/_native.py refuses a library that does not fit the package.
std::string build_info() {
  const char* refusal = fastkit::isa_refusal();
  std::string isas;
  for (fastkit::Isa isa : fastkit::kIsas) {
    if (fastkit::isa_usable(isa)) isas += (isas.empty() ? "" : ", ") + quoted(fastkit::isa_name(isa));
  }
  const std::string cuda = fastkit::cuda_version();
  return "{\"version\": " + quoted(FASTKIT_VERSION) + ", \"schema_sha256\": " + quoted(FASTKIT_SCHEMA_SHA256) +
         ", \"compiler\": " + quoted(FASTKIT_COMPILER) + ", \"torch_target\": \"2.10\", \"cuda\": " +
         (cuda.empty() ? "null" : quoted(cuda.c_str())) + ", \"cuda_archs\": " + quoted(FASTKIT_CUDA_ARCHS) +
         ", \"cpu_isas\": [" + isas + "], \"cpu_isa\": " + quoted(fastkit::isa_name(fastkit::active_isa())) +
         ", \"refusal\": " + (refusal == nullptr ? "null" : quoted(refusal)) + "}";
}

}  // namespace

STABLE_TORCH_LIBRARY(fastkit, m) {
  // What the library was built from and for, and the instruction set that its CPU kernels use: JSON.
  m.def("build_info() -> str");
  // The newest CUDA that this machine's driver runs, "13.0"; empty without a driver and in a CPU build. Not among the
  // facts above, which are asked at import: it opens the driver's library.
  m.def("cuda_driver_version() -> str");

  // Second-order recursive filters of each row of x (B,C,T), coefficients a (B|1,C|1,K,2), b (B|1,C|1,K,3) per chunk;
  // a bank (.., K,F,2|3) is summed. States y (B,C[,F],2) and x (B,C,2) before the first sample, newest first.
  // cu_seqlens (S+1): x is (1,C,total), S replaces B in the states. chunk = 2^62: one filter for all of a sequence.
  // end_y, end_x: the states after the last sample. borders: what a bank keeps for backward. Empty where not needed.
  m.def(
      "iir_scan_fwd(Tensor x, Tensor a, Tensor? b, Tensor? state_y, Tensor? state_x, Tensor? cu_seqlens, int chunk, "
      "bool carry, bool needs_end, bool needs_borders) -> (Tensor y, Tensor end_y, Tensor end_x, Tensor borders)");
  // Its gradients to x, to the states, and to a and b per row (B,C,K[,F],2|3). y of a single filter, borders of a bank.
  m.def(
      "iir_scan_bwd(Tensor gy, Tensor? gend_y, Tensor? gend_x, Tensor x, Tensor? y, Tensor? borders, Tensor a, "
      "Tensor? b, Tensor? state_y, Tensor? state_x, Tensor? cu_seqlens, int chunk, bool carry, bool needs_x, "
      "bool needs_coefficients) -> (Tensor gx, Tensor ga, Tensor gb, Tensor gstate_y, Tensor gstate_x)");
  // S filters one after another, (a1, a2) and (b0, b1, b2) the rows of a (S,2) and b (S,3). borders: what backward
  // takes for the gradients of these; empty where not needed, and of one filter, whose backward takes y instead.
  m.def("sosfilt_fwd(Tensor x, Tensor a, Tensor b, bool needs_borders) -> (Tensor y, Tensor borders)");
  // Its gradients to x, a and b.
  m.def(
      "sosfilt_bwd(Tensor gy, Tensor x, Tensor borders, Tensor a, Tensor b, bool needs_x, bool needs_coefficients) -> "
      "(Tensor gx, Tensor ga, Tensor gb)");
  // One sample of every row: x (B,C), a (B|1,C|1[,F],2), b (B|1,C|1[,F],3), states as above.
  m.def(
      "iir_step_fwd(Tensor x, Tensor a, Tensor? b, Tensor state_y, Tensor state_x) -> "
      "(Tensor y, Tensor end_y, Tensor end_x)");

  // Adds scale h b^T to y (N,O), with h (N,R) = x (mask * a)^T, x (N,D) or, where it is given, lora_x; a (R,D), b (O,R).
  // square_sum (D), float32: of the columns of x, empty unless needed.
  m.def(
      "lora_linear_fwd_(Tensor(a!) y, Tensor x, Tensor? lora_x, Tensor a, Tensor? mask, Tensor b, float scale, "
      "bool needs_square_sum) -> (Tensor h, Tensor square_sum)");
  // Its gradients to a and b, and to a bias; that to x, or to lora_x in its place, is added to gx or written over it.
  m.def(
      "lora_linear_bwd_(Tensor(a!)? gx, Tensor gy, Tensor x, Tensor h, Tensor a, Tensor? mask, Tensor b, float scale, "
      "bool adds, bool needs_adapter, bool needs_bias) -> (Tensor ga, Tensor gb, Tensor gbias)");
  // Sums of squares (D), float32, of the columns of x (N,D).
  m.def("column_square_sums(Tensor x) -> Tensor");
  // Zeroes the floor(ratio D) entries of each row of each matrix (R,D) with the least |entry| norm (D), of equal ones
  // the first; writes what is kept, a dense mask for each matrix.
  m.def("prune_rows_(Tensor(a!)[] matrices, Tensor[] norms, float ratio, Tensor(b!)[] masks) -> ()");

  // The gates of FocusLayer, of logits (N,3C) r, u and h: s = silu(r) y; o = residual + sigmoid(u) (silu(h + m) -
  // residual), which takes the place of m. All others (N,C).
  m.def("focus_gates_reset(Tensor logits, Tensor y) -> Tensor s");
  m.def("focus_gates_update_(Tensor(a!) m, Tensor logits, Tensor residual) -> ()");
  // Their gradients: first to u and h, in their places, and to the residual in that of m, from go; then to r in its
  // place and to y in that of gs.
  m.def("focus_gates_update_bwd_(Tensor(a!) logits, Tensor(b!) m, Tensor residual, Tensor go) -> ()");
  m.def("focus_gates_reset_bwd_(Tensor(a!) logits, Tensor(b!) gs, Tensor y) -> ()");

  // Maxima (B,K-1,C,pool) of `pool` cells of each block but the last of y[t] = sum_n taps[n] x[t-n], x (B,T,C), taps
  // (C,n); and where in its block each is.
  m.def("pooled_conv_fwd(Tensor x, Tensor taps, int block, int pool) -> (Tensor maxima, Tensor places)");
  // Its gradients to x and taps.
  m.def(
      "pooled_conv_bwd(Tensor gmaxima, Tensor places, Tensor x, Tensor taps, int block, int pool) -> "
      "(Tensor gx, Tensor gtaps)");

  // Of a block of logits (N,c), of classes first .. first + c - 1: folds into state (N,4) of each token the largest z,
  // the sum of e^(z - that), the z of its target (N), and the sum of class_weight (V) times z where `smooths`;
  // z = softcap tanh(logit / softcap), or the logit where softcap is 0.
  m.def(
      "linear_cross_entropy_sums_(Tensor(a!) state, Tensor logits, Tensor target, int first, float softcap, "
      "Tensor? class_weight, bool smooths) -> ()");
  // dz (N,c) = a e^(z - lse) - b [class is the target] - c class_weight, with a, b, c the coefficients (N,3), times the
  // derivative of z; 0 in rows whose coefficients are. It may be the logits.
  m.def(
      "linear_cross_entropy_gradient_(Tensor(a!) dz, Tensor logits, Tensor target, Tensor lse, Tensor coefficients, "
      "int first, float softcap, Tensor? class_weight) -> ()");

  // Count (), float64, mean (D) and scatter (D,D) of the rows of x (N,D), each counted as its weight (N) says.
  m.def("moments_fwd(Tensor x, Tensor? weights) -> (Tensor count, Tensor mean, Tensor scatter)");

  // Square sums (n,L), float64, of gradients of n tensors under L terms, term-major; 0 where there is none.
  m.def("mtadam_square_sums(Tensor?[] grads, int n) -> Tensor");
  // One step of Adam for L losses on n tensors. grads are of the terms from `first` on, their moments are folded in;
  // where `applies`, parameters move. exp_avg_sqs (L n) and grads term-major; grad_norms (n,L), steps (n); square_sums
  // (n, terms in grads), float64; lr_tensor, found_inf: one number, float64 and float32; grad_scales (L), float32.
  m.def(
      "mtadam_update_(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!) grad_norms, Tensor(f!) steps, Tensor? square_sums, float lr, "
      "Tensor? lr_tensor, float[] betas, float eps, float weight_decay, bool decoupled, float[] ranks, int anchor, "
      "float alive_eps, float max_scale, str nonfinite, Tensor? grad_scales, Tensor? found_inf, int first, "
      "bool applies) -> ()");

  // Of x (B,D), weight (H,C,D) and bias (H,C): logits z (H,C,B), of each head its loss (H) and what it has right (H), and
  // out of how many, count (). target: (B) int64, of a single label; wanted (C,B), of the others. gradient: dz takes the
  // place of z.
  m.def(
      "multihead_loss_fwd_(Tensor x, Tensor weight, Tensor bias, Tensor? target, Tensor? wanted, Tensor? class_weight, "
      "str problem, float label_smoothing, int ignore_index, bool gradient, Tensor(a!) z, Tensor(b!) loss, "
      "Tensor(c!) correct, Tensor(d!) count) -> ()");
  // The gradients of the sum of g_loss (H) times the losses to x, weight and bias, those that are given.
  m.def(
      "multihead_loss_bwd_(Tensor g_loss, Tensor dz, Tensor x, Tensor weight, Tensor? target, int ignore_index, "
      "Tensor(a!)? g_x, Tensor(b!)? g_weight, Tensor(c!)? g_bias) -> ()");
  // Of rows (H,C,D): sums (C,H) of rho of the products of each with later heads' of its class, and the gradient (H,C,D)
  // of all sums.
  m.def(
      "multihead_loss_penalty_(Tensor rows, str kind, float width, Tensor(a!) sums, Tensor(b!)? gradient) -> ()");

  // Of candidates (G,m,D), each argument of one image set or of all: score, variance and increment (G,m) beside chosen
  // (G,S,D); and the indices, scores and variances (G,k) of those that are chosen one after the other.
  m.def(
      "phrase_scores_fwd(Tensor candidates, Tensor centroid, Tensor scatter, Tensor? chosen, Tensor? prior, "
      "float variance_weight, float orthogonality_weight, float prior_weight) "
      "-> (Tensor score, Tensor variance, Tensor increment)");
  m.def(
      "select_phrases_fwd(Tensor candidates, Tensor centroid, Tensor scatter, Tensor? prior, int k, bool deflate, "
      "float variance_weight, float orthogonality_weight, float prior_weight) "
      "-> (Tensor indices, Tensor scores, Tensor variances)");

  // The orthogonal factors of m (B,P,Q), P >= Q, and whether they have become orthogonal (B). Steps, three numbers each:
  // x (a + b x^2) / (1 + c x^2) of each singular value x, then x (c0 + c1 x^2 + c2 x^4), which are taken again if needed.
  m.def("polar_fwd(Tensor m, float[] rationals, float[] quintics) -> (Tensor w, Tensor orthogonal)");

  // The k best rows of keys (m,D) for each of queries (n,D): q . x + key_bias (m), descending, or |q - x|^2, ascending;
  // the lower index first of equal ones, NaN and -1 where fewer are numbers. Values (n,k), float32 for half precision.
  m.def(
      "topk_similarity_fwd(Tensor queries, Tensor keys, Tensor? key_bias, int k, bool l2) -> "
      "(Tensor values, Tensor indices)");
  // The k best keys by q . x for each query, (n,k), and the k best queries for each key, (m,k), in one pass.
  m.def(
      "topk_similarity_both_fwd(Tensor queries, Tensor keys, int k) -> "
      "(Tensor values, Tensor indices, Tensor key_values, Tensor key_indices)");
  // Each row of x (n,D) over its norm, float32 for half precision: 0 of a row of zeros, NaN of one with inf or NaN.
  m.def("unit_rows(Tensor x) -> Tensor");

  // One epoch of iterative closest points for R restarts of maps w_xy, w_yx (R,D,D) between source (n,D) and
  // target (m,D): searches, unless nearest_target (R,n) and nearest_source (R,m) are given; then steps of Adam.
  m.def(
      "icp_epoch_fwd(Tensor source, Tensor target, Tensor w_xy, Tensor w_yx, Tensor seeds, Tensor? nearest_target, "
      "Tensor? nearest_source, int epoch, int batch_size, float lr, float beta1, float beta2, float eps, "
      "float cycle_weight, bool mutual_only) -> (Tensor w_xy, Tensor w_yx, Tensor nearest_target, "
      "Tensor nearest_source, Tensor cost, Tensor mutual)");

  // Lines of text (N), uint8, into rows of vectors (M,D), at most M of them: a word, then D numbers, with blanks
  // between. For each, lines (L,5): where it begins, where its word ends, where it ends, how many fields follow the
  // word, and of D of them the first that is no finite number, from 1 on; 0: all are, -1: and are zero. The row of a
  // line without D numbers is NaN.
  m.def("parse_vectors_(Tensor text, Tensor(a!) vectors) -> Tensor lines");
  // The numbers of each row of vectors (N,D), float32, the shortest that are read back as they are, with blanks
  // between: of its bytes in text (N,16 D), uint8, as many as lengths (N) says.
  m.def("format_vectors(Tensor vectors) -> (Tensor text, Tensor lengths)");
}

STABLE_TORCH_LIBRARY_IMPL(fastkit, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("cuda_driver_version", TORCH_BOX(&fastkit::cuda_driver_version));
}
