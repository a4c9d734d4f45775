"""Show that the native tests can fail: build the library with one break at a time.

    python -m tests.tools.broken_builds               # every break, and the tests that have to notice it
    python -m tests.tools.broken_builds fold mask     # the breaks whose name contains one of these
    python -m tests.tools.broken_builds device-batch  # the breaks of attention on GPUs (NAIVE)

Exits with 1 if a break goes unnoticed. The first run takes a full build, and each break about half a
minute of compilation. The working tree does not change.
"""

# ruff: noqa: E501 - a table of texts of the sources

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support import native_build
from tests.support.native_build import ROOT

SOURCES = ROOT / "native/src"
RAZOR, PROFILE, DEVICE = "llama-razor.cpp", "llama-razor-profile.cpp", "llama-razor-device.cpp"
PLAN, FRONTIER = "llama-razor-plan.cpp", "llama-razor-plan.h"
CACHE, GRAPH = "llama-kv-cache-razor.cpp", "llama-graph-razor.cpp"
REWIND, PREFILL = "llama-razor-rewind.cpp", "llama-razor-prefill.cpp"
SOURCE, PAGES = "llama-razor-source.cpp", "llama-razor-pages.cpp"
RPC, RPC_BACKEND = "llama-razor-rpc.cpp", "rpc/ggml-razor-rpc.cpp"
MEMORY, FULL = "llama-memory-razor.cpp", "llama-razor-full.cpp"
ATTN, KERNEL = "cpu/llama-razor-attn-op.cpp", "cpu/llama-razor-attn-kernel.h"


@dataclass(frozen=True)
class Break:
    """One text of one file of native/src replaced by another, and test functions that must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    naive: bool = False  # in a library with NAIVE


# Only some GPUs read the arrays that libllama prepares for a batch (ggml-razor.h, "attention of a batch"). These changes
# pass them to CPUs, where naive_batch.h computes the attention of batches from them. test_naive_batch.py runs the native
# tests in this way.
NAIVE = [
    (DEVICE, "static void razor_device_abort(ggml_tensor * /* dst */, int /* ith */, int /* nth */, void * /* userdata */) {",
     '#include "naive_batch.h"\n\nstatic void razor_device_abort(ggml_tensor * dst, int ith, int nth, void * /* userdata */) {\n    if (naive_batch(dst, ith, nth)) {\n        return;\n    }\n'),
    (CACHE, "layer.device_batch = layer.device &&",
     "layer.device_batch = (!split && cparams.flash_attn && ggml_backend_buft_is_host(buft) && !hparams_model.attn_soft_cap && n_retrieval + n_local <= GGML_RAZOR_ATTN_MAX_KV) || layer.device &&"),
    (GRAPH, "layer.attn    ? attn.build(", "layer.attn && (n_tokens == 1 || sinks || !layer.device_batch) ? attn.build("),
]  # fmt: skip

BREAKS = [
    # attention and folds
    Break("mask-without-log-n", GRAPH, "const double n_folded = step.frontier - group.sink_tokens;", "const double n_folded = 1;",
          "test_f32_cache_equals_the_reference test_any_plan_equals_the_reference test_error_is_within_stocks_own test_single_token_decode_across_folds test_larger_blocks test_several_threads"),
    Break("mask-without-second-cell", GRAPH, "rest > 0.0 ?", "false ?", "test_f32_cache_equals_the_reference"),
    Break("mask-without-sinks", GRAPH, "p < std::min(group.sink_tokens, pos0)", "p < 0", "test_window_that_holds_everything_equals_stock test_window_longer_than_the_text"),
    # full caches
    Break("full-other-head", ATTN, "op.by_token ? j : group.first_row", "op.by_token ? 0*j : group.first_row", "test_an_f32_cache_equals_the_reference test_the_error_is_within_stocks_own test_removals_in_the_middle_and_shifts"),
    Break("full-head-stride", ATTN, "task.v.row_bytes = v->nb[op.by_token ? 2 : 1];", "task.v.row_bytes = v->nb[1];", "test_an_f32_cache_equals_the_reference"),
    Break("full-last-chunk-alone", KERNEL, "merge(m_all[i], l_all[i], o_all + i*d_v, m[i], l[i], o + i*d_v, d_v);\n                clear", "clear", "test_an_f32_cache_equals_the_reference test_the_attention_of_a_token_does_not_depend_on_its_batch"),
    Break("full-always", PLAN, "asked ? asked->own_attention :", "asked ? true :", "test_where_it_does_not_run test_razor_false_is_stock_to_the_bit"),
    Break("full-not-by-metadata", PLAN, "model.razor && model.razor->enabled;", "false;", "test_a_model_whose_plan_saves_nothing_runs_it"),
    Break("full-two-sequences", PLAN, "cparams.n_seq_max > 1 || !razor_wants", "!razor_wants", "test_where_it_does_not_run"),
    Break("mask-by-the-clock", GRAPH, "float val = log(n_folded);", "float val = log(n_folded) + 1e-3f*(ggml_time_us() % 7);", "test_same_split_twice_is_bit_identical test_kv_offload_flag"),
    Break("fold-dropped", GRAPH, "build_fold(g, layer, group, view_local(g.ctx0, layer, layer.v_local, i_group), sums.v);", "", "test_f32_cache_equals_the_reference"),
    Break("fold-off-by-one", GRAPH, "data[i] = plan.cell(step.fold_from + i);", "data[i] = plan.cell(step.fold_from + i + 1);", "test_f32_cache_equals_the_reference test_logits_equal_a_float64_model"),
    Break("fold-starts-from-old-sum", GRAPH, "step.fold_from == plan.sink_tokens ? kv::SLOT_ZERO : 1 - step.slot", "1 - step.slot", "test_emptied_cache_starts_from_zero"),
    Break("frontier-late", FRONTIER, "start - window > sink_tokens ? start - window", "start - window > sink_tokens ? start - window - 1", "test_f32_cache_equals_the_reference"),
    Break("head-flipped", PLAN, "windows[i] = mask[i] ? 0 : window;", "windows[i] = (mask[i] != 0) != (i == 1) ? 0 : window;", "test_f32_cache_equals_the_reference"),
    Break("heads-not-gathered", GRAPH, "order.identity = order.identity && order.groups[sorted[i - 1]].back() < order.groups[sorted[i]].front();", "", "test_f32_cache_equals_the_reference"),
    Break("rows-of-other-heads", GRAPH, "data[at] = first + j*head_rows + cell;", "data[at] = first + (k == 0 ? j : heads_kv.size() - 1 - j)*head_rows + cell;", "test_f32_cache_equals_the_reference"),
    Break("transposed-rows-of-other-heads", GRAPH, "data_kv[i_kv] = h;", "data_kv[i_kv] = i_kv;", "test_f32_cache_equals_the_reference"),
    Break("heads-out-not-gathered", GRAPH, "data_out[h*n_gqa + j]    = i_kv*n_gqa + j;", "data_out[h*n_gqa + j]    = h*n_gqa + j;", "test_f32_cache_equals_the_reference"),
    Break("ubatch-crosses-folds", CACHE, "std::min(n_ubatch, n_to_frontier(s_next))", "n_ubatch", "test_ubatch_size test_random_splits test_size_of_ubatches"),
    Break("copies-before-the-store", GRAPH, "    if (!ggml_is_contiguous(cur)) {", "    if (true) {", "test_nodes_added_per_layer test_layers_of_retrieval_heads_add_none"),
    Break("copies-in-the-fold", GRAPH, "cur = ggml_mul(ctx0, cur, group.fold_inv);", "cur = ggml_mul(ctx0, ggml_cont(ctx0, cur), group.fold_inv);", "test_nodes_of_a_fold"),
    # attention on CPUs
    Break("attention-of-the-other-mask", GRAPH, "&order.groups[i + 1], groups[i].mask, first + (int64_t)", "&order.groups[i + 1], kq_mask, first + (int64_t)", "test_each_kernel_equals_the_reference"),
    Break("attention-of-the-wrong-rows", GRAPH, "plan.first_row(layer.il, i), plan.groups[i].cells });", "plan.first_row(layer.il, i), plan.groups[i].cells - 1 });", "test_each_kernel_equals_the_reference"),
    Break("heads-in-the-order-of-groups", ATTN, "(*group.heads)[j]*op.n_gqa", "(i_group == 0 ? j : j + (int64_t) op.groups[0].heads->size())*op.n_gqa", "test_each_kernel_equals_the_reference"),
    Break("huge-pages-not-asked-for", PAGES, "madvise(pages.first, pages.size, MADV_HUGEPAGE)", "(void) 0", "test_caches_use_huge_pages"),
    Break("huge-pages-of-the-razor-cache-lost", CACHE, "        razor_use_huge_pages(buf);\n", "", "test_caches_use_huge_pages"),
    Break("small-pages-stay", PAGES, "madvise(pages.first, pages.size, MADV_DONTNEED) == 0", "true", "test_caches_use_huge_pages"),
    Break("pairs-of-a-lane-exchanged", KERNEL, "a[j + 0] = RAZOR_SHUFFLE(b[j + 0], b[j + 2], RAZOR_EACH_LANE(0, 1, W + 0, W + 1));", "a[j + 0] = RAZOR_SHUFFLE(b[j + 0], b[j + 2], RAZOR_EACH_LANE(2, 3, W + 2, W + 3));", "test_each_kernel_equals_the_reference"),
    Break("parts-not-weighted", KERNEL, "const float f     = exp_neg(splat(m - m_new))[0];", "const float f     = 1.0f;", "test_any_shape_and_any_cut_into_tasks"),
    Break("part-lost", ATTN, "group.n_chunks = (group.n_kv + chunk - 1)/chunk;", "group.n_chunks = std::max<int64_t>(1, group.n_kv/chunk);", "test_any_shape_and_any_cut_into_tasks"),
    Break("tasks-once-only", ATTN, "next.store(0, std::memory_order_relaxed);", "", "test_each_kernel_equals_the_reference test_several_threads"),
    Break("larger-scores-not-noticed", KERNEL, "l *= scale;", "", "test_each_kernel_equals_the_reference"),
    Break("unseen-rows-read", KERNEL, "if (live[c] != -__builtin_inff()) {", "if (c < n) {", "test_rows_that_nobody_sees_may_hold_anything"),
    Break("unseen-rows-read-in-place", KERNEL, "const bool whole = reduce_min(worst) > -__builtin_inff();", "const bool whole = true;", "test_rows_that_nobody_sees_may_hold_anything"),
    Break("nibbles-exchanged", KERNEL, "convertvector((x & 15) - 8, vf)", "convertvector((x >> 4) - 8, vf)", "test_error_of_each_kernel"),
    Break("any-kernel-name", ATTN, 'if (wanted.empty() || wanted == "off") {', "if (true) {", "test_an_unknown_kernel_is_refused"),
    Break("any-choice-for-devices", DEVICE, 'if (wanted.empty() || wanted == "on" || wanted == "ampere") {', "if (true) {", "test_an_unknown_choice_for_devices_is_refused"),
    Break("rows-of-64-bits", GRAPH, "any_device ? GGML_TYPE_I64 : GGML_TYPE_I32", "GGML_TYPE_I64", "test_rows_are_of_a_type_that_backends_copy"),
    Break("attention-of-more-nodes", GRAPH, "attn.build(g.ctx0, q_cur, layer.k, layer.v)", "ggml_cont(g.ctx0, attn.build(g.ctx0, q_cur, layer.k, layer.v))", "test_nodes_added_per_layer_on_cpus"),
    # attention of a batch. There are no breaks for a bias or the end of the cells in a tile: they have no effect, because
    # the cells of the other compensation token are in the same tile, and there are 256*n cells
    Break("device-batch-sees-the-next-token", GRAPH, "since_full[j] = std::max<int64_t>(i, 0);", "since_full[j] = std::max<int64_t>(i - 1, 0);", "test_f32_cache_equals_the_reference", naive=True),
    Break("device-batch-sees-its-end", GRAPH, "since[group.cell(step.pos0 + i)] = i;", "since[group.cell(step.pos0 + i)] = 0;", "test_f32_cache_equals_the_reference", naive=True),
    Break("device-batch-sees-hidden-cells", GRAPH, "since[j] = seen ? 0 : GGML_RAZOR_NEVER;", "since[j] = 0;", "test_f32_cache_equals_the_reference", naive=True),
    Break("device-batch-without-log-n", GRAPH, "bias[j]  = seen ? bias[j] : 0.0f;", "bias[j]  = 0.0f;", "test_f32_cache_equals_the_reference", naive=True),
    Break("device-batch-tiles-of-fewer-cells", GRAPH, "for (uint32_t j = first; j < end; ++j) {", "for (uint32_t j = first; j + 1 < end; ++j) {", "test_f32_cache_equals_the_reference", naive=True),
    Break("device-batch-tiles-always-seen-whole", GRAPH, "bias && bias[j] != 0.0f ? GGML_RAZOR_NEVER : since[j]", "0", "test_f32_cache_equals_the_reference", naive=True),
    Break("device-batch-of-other-rows", DEVICE, "params.cells  = attn.groups[1].head_rows;", "params.cells  = attn.groups[1].head_rows - 1;", "test_f32_cache_equals_the_reference", naive=True),
    Break("device-batch-of-the-first-sequence", DEVICE, "params.stream = stream;", "params.stream = 0*stream;", "test_sequences_are_computed_as_if_alone test_sequences_share_ubatches", naive=True),
    Break("device-batch-of-other-heads", DEVICE, "for (const uint32_t h : *attn.groups[0].heads) {", "for (const uint32_t h : *attn.groups[1].heads) {", "test_f32_cache_equals_the_reference", naive=True),
    # several machines
    Break("rpc-loss-not-reported", RPC, "if (is_lost(endpoint)) {", "if (false) {", "test_a_lost_server_is_reported"),
    Break("rpc-loss-ends-the-process", RPC, "set_callback([](const char * /* endpoint */) {});", "set_callback(nullptr);", "test_a_lost_server_is_reported"),
    Break("rpc-loss-forever", RPC_BACKEND, "razor_lost.erase(endpoint);", "", "test_a_lost_server_is_reported"),
    Break("rpc-functions-are-sent", RPC_BACKEND, "        case GGML_OP_CUSTOM:\n            return false;", "            return false;", "test_local_layers_keep_razors_attention"),
    # keys and values from a full cache
    Break("source-of-other-positions", FULL, "res[cells.pos_get(i) - p0] = strm*cells.size() + i;", "res[cells.pos_get(i) - p0] = strm*cells.size() + (i + 1) % cells.size();", "test_the_cache_is_that_of_a_prompt_that_was_read"),
    Break("source-of-keys-for-values", GRAPH, "get(source->cache->get_v_rows(il)", "get(source->cache->get_k_rows(il)", "test_the_cache_is_that_of_a_prompt_that_was_read"),
    Break("source-of-some-layers", SOURCE, "for (int i = 0; i < ggml_graph_n_nodes(res->get_gf()); ++i) {", "for (int i = ggml_graph_n_nodes(res->get_gf())/2; i < ggml_graph_n_nodes(res->get_gf()); ++i) {", "test_the_cache_is_that_of_a_prompt_that_was_read"),
    Break("source-in-a-reused-graph", GRAPH, "if (source || mctx->get_kv().source || prefill", "if (prefill", "test_any_splits_give_the_same_cache"),
    Break("source-without-the-tokens", CACHE, "if (!source->has(ubatches)) {", "if (false) {", "test_tokens_that_the_source_lacks"),
    Break("source-with-outputs", CACHE, "if (balloc.get_n_outputs() > 0) {", "if (false) {", "test_tokens_that_the_source_lacks"),
    Break("source-of-other-types", SOURCE, "if (k->type != plan.types.k || v->type != plan.types.v || k->type != plan.types_local.k || v->type != plan.types_local.v) {", "if (false) {", "test_refusals"),
    Break("source-of-other-local-types", SOURCE, " || k->type != plan.types_local.k || v->type != plan.types_local.v", "", "test_refusals"),
    Break("source-of-another-shape", SOURCE, "if (k->ne[0] != n_head_kv*hparams.n_embd_head_k(il) || v->ne[0] != n_head_kv*hparams.n_embd_head_v(il)) {", "if (false) {", "test_another_model_is_refused"),
    Break("source-without-flash-attention", SOURCE, "if (kv->get_v_trans()) {", "if (false) {", "test_refusals"),
    Break("source-with-small-batches", PREFILL, "kv->full_prefill || kv->source", "kv->full_prefill", "test_the_cache_is_that_of_a_prompt_that_was_read"),
    # rollback, abort
    Break("rollback-without-unfold", CACHE, "            unfold(st.groups[g], frontier);\n", "",
          "test_rollbacks_of_sequences test_every_length_can_be_rolled_back test_rolled_back_tokens_leave_nothing test_random_operations test_a_rollback_leaves_nothing"),
    Break("rollback-of-the-middle", CACHE, "if (p0 > n || p1 < n) {", "if (p0 > n) {", "test_refused_rollback_changes_nothing"),
    Break("rollback-always-refused", CACHE, "    if (plan.n_comp > 0 && st.groups[i_group].frontier_prev != (int64_t) to) {\n        return false;\n    }", "    return false;", "test_every_length_can_be_rolled_back"),
    Break("high-water-forgotten", CACHE, "st.n_high = std::max(st.n_high, n_end);", "st.n_high = n_end;", "test_rows_overwritten_before_a_rollback_are_remembered"),
    Break("clear-keeps-folds", CACHE, "        st = empty_state();\n    }\n\n    last_step", "    }\n\n    last_step", "test_emptied_cache_starts_from_zero"),
    Break("abort-keeps-fold", CACHE, "                unfold(st.groups[g], groups[g].fold_from);\n", "", "test_abort_in_a_batch_of_sequences test_abort_at_every_node test_an_abort_leaves_whole_ubatches"),
    Break("abort-with-lost-rows", CACHE, "overwritten || (groups[g].n_fold > 0 &&", "overwritten || (false &&", "test_abort_at_every_node"),
    Break("gaps-accepted", CACHE, "if (ubatch.pos[i] != (llama_pos) next[s]) {", "if (false) {", "test_positions_must_follow"),
    # prompts with full attention
    Break("prefill-sees-the-future", GRAPH, "row[n_seen + i] = llama_cast<T>(0.0f);", "row[std::min(n_seen + i + 1, n_kv - 1)] = llama_cast<T>(0.0f);", "test_prompts_equal_the_reference test_any_conversation_equals_the_reference test_a_prompt_equals_a_full_cache"),
    Break("prefill-without-the-past", GRAPH, "if (reads && prefill->copies_past(get_step().pos0)) {", "if (false) {", "test_prompts_equal_the_reference"),
    Break("prefill-at-an-old-frontier", PREFILL, "step.frontier = plan.groups[g].frontier(pos0);", "step.frontier = past.groups[g].frontier;", "test_prompts_equal_the_reference"),
    Break("prefill-of-other-heads", GRAPH, "data[i*order.n_head_kv + h] = row + first + i;", "data[i*order.n_head_kv + (h + 1) % order.n_head_kv] = row + first + i;", "test_prompts_equal_the_reference test_architectures_read_prompts"),
    Break("prefill-without-distances", GRAPH, "            row[prefill.n_past + p - prefill.pos0] = llama_cast<T>(-(float) (pos - p));", "            row[prefill.n_past + p - prefill.pos0] = llama_cast<T>(0.0f);", "test_architectures_read_prompts"),
    Break("prefill-of-types-unlike-the-cache", PREFILL, "layer.v_local->type, layer.v_local->ne[0], n_rows", "GGML_TYPE_F32, layer.v_local->ne[0], n_rows", "test_a_prompt_equals_a_full_cache"),
    Break("prefill-of-exact-rows", PREFILL, "layer.k_local->type, layer.k_local->ne[0], n_rows);\n    v = ggml_new_tensor_2d(ctx_rows.get(), layer.v_local->type,", "GGML_TYPE_F32, layer.k_local->ne[0], n_rows);\n    v = ggml_new_tensor_2d(ctx_rows.get(), GGML_TYPE_F32,", "test_local_heads_with_types_of_their_own"),
    Break("prefill-keeps-frontiers", CACHE, "    v_heads[strm] = head;\n\n    streams[strm] = st;", "    v_heads[strm] = head;", "test_prompts_equal_the_reference"),
    Break("prefill-keeps-a-stale-plan", PREFILL, "    ggml_backend_sched_reserve(kv.get_sched(), gf);\n", "", "test_the_rewind_log_of_a_prompt"),
    Break("prefill-logs-one-layer", CACHE, "for (size_t il = prefill ? prefill->il : 0;", "for (size_t il = 0;", "test_going_back_into_a_prompt test_the_rewind_log_of_a_prompt"),
    Break("prefill-keeps-an-aborted-prompt", PREFILL, "    prefill->kv->clear_stream(prefill->strm);\n", "", "test_progress_and_abort_in_every_layer"),
    Break("prefill-keeps-an-aborted-last-layer", CACHE, "if (last_is_prefill) {", "if (false) {", "test_progress_and_abort_in_every_layer"),
    Break("prefill-counts-no-rows", PREFILL, "for (const auto * buf : { &buf_states, &buf_rows }) {", "for (const auto * buf : { &buf_states }) {", "test_temporary_buffers"),
    Break("prefill-of-many-outputs", CACHE, "full_prefill && balloc.get_n_outputs() > cparams.n_outputs_max", "false", "test_a_prompt_exceeds_a_batch"),
    Break("prefill-of-mixed-batches", PREFILL, "u.n_seqs_unq != 1 || u.seq_id[0][0] != first.seq_id[0][0]", "false", "test_other_sequences_are_not_touched"),
    Break("prefill-of-short-prompts", PREFILL, " || plan.frontier_end(first.pos[0]) > (uint32_t) last.pos[0]", "", "test_the_plan_knows_when_it_matters"),
    Break("prefill-of-sliding-windows", PREFILL, "    if (!kv) {\n        return llama_razor_get_cache", "    if (false) {\n        return llama_razor_get_cache", "test_refusals_to_read_fully"),
    # rewind log
    Break("rewind-without-rows", CACHE, "want.end  = std::min(p0, first_in_ring(st.n_high));", "want.end  = want.from;", "test_rewinds_to_random_positions test_an_aborted_fold_is_undone"),
    Break("rewind-across-the-end-of-the-ring", CACHE, "std::min(std::min(end, want.end) - pos, group.sink_tokens + group.ring() - cell)", "std::min(end, want.end) - pos", "test_rewinds_to_random_positions"),
    Break("rewind-to-the-other-slot", CACHE, "state.slot ^ ((state.frontier - frontier + plan.block - 1)/plan.block & 1);", "state.slot;", "test_rewinds_to_random_positions"),
    Break("rewind-without-compensation", CACHE, "want.move_comp = plan.n_comp > 0 && frontier > plan.sink_tokens;", "want.move_comp = false;", "test_rewinds_to_random_positions test_rewinds_of_sequences"),
    Break("rewind-of-one-cell", CACHE, "want.move_comp && i < llama_razor_group::N_COMP_CELLS;", "want.move_comp && i < 1;", "test_rewinds_to_random_positions"),
    Break("rewind-without-sums", CACHE, "                if (want.move_comp) {\n                    f(t, data, strm*t->nb[2]", "                if (false) {\n                    f(t, data, strm*t->nb[2]", "test_a_rewound_state_continues"),
    Break("rewind-to-another-edge", CACHE, "group.move_comp = group.move_comp && start == edge;", "", "test_rewinds_to_random_positions"),
    Break("rewind-of-rows-in-another-block", CACHE, "            add_block((want.from + group.window)/plan.block*plan.block + plan.block);\n", "", "test_a_log_with_a_limit"),
    Break("rewind-with-lost-rows", CACHE, "    st.n_high = step.n_high;\n", "", "test_rewinds_to_random_positions"),
    Break("rewind-of-the-first-stream", CACHE, "return strm*t->nb[2] + (plan.first_row", "return 0*strm*t->nb[2] + (plan.first_row", "test_rewinds_of_sequences"),
    Break("rewind-without-cut", REWIND, "blocks.back().start > pos", "false", "test_bytes_of_the_log test_rewinds_to_random_positions"),
    Break("rewind-cut-too-far", CACHE, "rewind->cut(strm, p0);", "rewind->cut(strm, p0 - 1);", "test_rewinds_to_random_positions"),
    Break("rewind-not-in-aborts", CACHE, "if (!can_rewind(step) || !load_rewind(step)) {", "if (true) {", "test_an_aborted_fold_is_undone"),
    Break("rewind-keeps-aborted-fold", CACHE, "        rewind->cut(strm, p0 - 1);\n", "", "test_an_aborted_fold_is_undone"),
    Break("rewind-unlimited", REWIND, "n_used > 0 && n_used >= n_max", "false", "test_a_log_with_a_limit"),
    Break("rewind-beyond-a-small-limit", REWIND, "    if (n_max == 0) {\n        return;\n    }\n", "", "test_a_limit_below_a_block"),
    Break("rewind-drops-newest", REWIND, "blocks.front().serial < oldest", "blocks.front().serial > oldest", "test_the_oldest_blocks_of_all_sequences_go"),
    Break("rewind-not-copied", REWIND, "streams[dst] = streams[src];", "streams[dst].clear();", "test_rewinds_of_sequences"),
    Break("rewind-survives-clear", CACHE, "        rewind->clear(s);\n", "", "test_bytes_of_the_log"),
    Break("rewind-survives-load", CACHE, "    if (rewind) {\n        rewind->clear(strm);\n    }\n", "", "test_a_loaded_state_has_no_log"),
    Break("rewind-unread", CACHE, "        if (!step.data.back()) {\n            return false;\n        }\n", "", "test_a_log_that_cannot_be_read"),
    Break("rewind-unwritten", REWIND, "return file.write(buffer.data(), size, slot*n_block + offset);", "file.write(buffer.data(), size, slot*n_block + offset);\n\n        return true;", "test_a_full_disk"),
    Break("rewind-keeps-disk", REWIND, "        file.truncate();\n", "", "test_a_full_disk"),
    Break("rewind-with-a-name", REWIND, "unlink(path.c_str());", "", "test_rewinds_to_random_positions"),
    Break("rewind-of-other-bytes", REWIND, "if (checksum(data, part.size) != part.sum) {", "if (false) {", "test_a_log_with_other_bytes"),
    Break("rewind-truncated-by-a-child", REWIND, "        if (is_forked()) {\n            return;", "        if (false) {\n            return;", "test_a_forked_process_leaves_the_log_alone"),
    Break("rewind-read-by-a-child", REWIND, "        if (is_forked()) {\n            errno", "        if (false) {\n            errno", "test_a_forked_process_leaves_the_log_alone"),
    Break("rewind-anywhere", REWIND, "        if (fd < 0) {", "        if (false) {", "test_refused_parameters_of_the_log"),
    Break("rewind-position-of-stock", CACHE, "std::max<llama_pos>(n - n_rollback(strm), 1) - 1 :", "0 :", "test_sequences_are_computed_as_if_alone test_a_log_with_a_limit"),
    # sliding windows, recurrent states, M-RoPE
    Break("parts-not-asked", MEMORY, "if (!all && !none && !can_keep(s, p0)) {", "if (false) {", "test_rollback_beyond_the_sliding_window test_rollback_of_hybrids test_llama_goes_on_from_another_prompt"),
    Break("sliding-part-not-cut", MEMORY, "            swa->seq_rm(s, n, -1);\n", "", "test_rollback_with_sliding_windows"),
    Break("sliding-part-tried-in-place", MEMORY, "        cells = before;\n", "", "test_cells_in_another_order"),
    Break("abort-keeps-sliding-part", MEMORY, "        swa->seq_rm(seq_id, p0, -1);\n", "", "test_abort"),
    Break("abort-keeps-states", MEMORY, "    if (recr) {\n        LLAMA_LOG_WARN", "    if (recr) {\n        return;\n        LLAMA_LOG_WARN", "test_abort"),
    Break("soft-cap-lost", KERNEL, "if (t.cap != 0.0f) {\n                soft_cap_row", "if (false) {\n                soft_cap_row", "test_attention_of_each_layer"),
    Break("sinks-lost", KERNEL, "            if (t.sinks) {\n                add_sink(m_all", "            if (false) {\n                add_sink(m_all", "test_attention_of_each_layer"),
    Break("sinks-of-parts-lost", KERNEL, "    if (t.sinks) {\n        add_sink(m, l, t.out", "    if (false) {\n        add_sink(m, l, t.out", "test_few_and_many_cells"),
    Break("sinks-of-the-first-heads", GRAPH, "first*n_gqa*sinks->nb[0]", "0*first", "test_attention_of_each_layer"),
    Break("embeddings-accepted", CACHE, "model.hparams.n_pos_per_embd() > 1 && !ubatch.token", "false", "test_embeddings_are_refused_with_mrope"),
    Break("state-rollback-accepted", PLAN, "cparams.n_rs_seq > 0)", "false)", "test_rollback_states_are_refused"),
    Break("parts-not-counted", RAZOR, "res.kv_bytes_sliding = razor_get_bytes(iswa->get_swa());", "", "test_bytes"),
    # several sequences
    Break("sequences-in-one-stream", CACHE, "apply_seq(get_stream(ubatch.seq_id[i][0]),", "apply_seq(0,", "test_sequences_are_computed_as_if_alone"),
    Break("sequences-beyond-frontiers", CACHE, "n_each <= n_room && ", "", "test_sequences_share_ubatches"),
    Break("sequences-with-frontier-of-one", CACHE, "n_room = std::min(n_room, n_to_frontier(s));", "", "test_sequences_share_ubatches"),
    Break("sequences-never-together", CACHE, "} else if (n_seqs > 1 && ", "} else if (false && ", "test_sequences_share_ubatches"),
    Break("sequences-full", CACHE, "next[s] = n_tokens(s);", "next[s] = n_tokens(0);", "test_a_sequence_that_is_full test_sequences_are_computed_as_if_alone"),
    Break("sequences-with-first-mask", GRAPH, "i*n_tokens*kq_mask->nb[1]", "0", "test_sequences_share_ubatches test_more_sequences_than_an_ubatch_holds"),
    Break("sequences-with-first-tokens", GRAPH, "i*n_tokens*cur->nb[2]", "0", "test_sequences_share_ubatches"),
    Break("sequences-coupled", CACHE, "if (batch.n_seq_id[i] != 1 || ", "if (", "test_a_token_of_several_sequences"),
    Break("sequences-with-gaps", CACHE, "ubatch.pos[i] != (llama_pos) next[s]", "false", "test_positions_of_each_sequence_must_follow"),
    Break("sequences-unified", PLAN, "if (cparams.n_seq_max > 1 && cparams.kv_unified) {", "if (false) {", "test_unified_sequences_are_refused test_unsupported_context"),
    Break("sequences-planned-as-one", PLAN, "model, cparams.n_ctx_seq);", "model, cparams.n_ctx);", "test_sequences_for_which_razor_saves_nothing"),
    Break("sequences-reserved-as-one", GRAPH, "if (kq_mask->ne[3] > 1) {", "if (false) {", "test_sequences_are_computed_as_if_alone"),
    Break("sequences-with-stats-of-one", RAZOR, "const uint32_t strm = kv->get_stream(seq_id);", "const uint32_t strm = 0;", "test_sequences_are_computed_as_if_alone"),
    Break("sequences-unchecked", RAZOR, "if (!kv || seq_id < 0 || (uint32_t) seq_id >= kv->get_n_seq_max()) {", "if (!kv) {", "test_statistics_of_no_sequence"),
    Break("sequences-not-counted", RAZOR, "plan.n_rows_retrieval(il)*t->nb[1]*t->ne[2]", "plan.n_rows_retrieval(il)*t->nb[1]", "test_bytes_of_sequences"),
    Break("removal-not-asked", CACHE, "if (!is_shorter && !can_remove(s, p0, p1)) {", "if (false) {", "test_removal_from_all_sequences test_rollbacks_of_sequences"),
    Break("removal-from-short-sequences", CACHE, "seq_id < 0 && n_stream > 1 && n_tokens(s) < (uint32_t) p0", "false", "test_removal_from_all_sequences"),
    Break("removal-of-all-sequences", CACHE, "    if (p0 == 0 && p1 >= n) {\n        clear_stream(strm);", "    if (p0 == 0 && p1 >= n) {\n        clear(false);", "test_removal_of_a_sequence"),
    Break("others-kept", CACHE, "if ((llama_seq_id) s != seq_id) {", "if (false) {", "test_keeping_one_sequence"),
    Break("other-sequence-unusable", CACHE, "streams[seq_id].broken = true;", "streams[0].broken = true;", "test_shifts_of_one_sequence"),
    Break("copy-of-cells-alone", CACHE, "    copies.emplace_back(seq_id_src, seq_id_dst);", "", "test_copies_are_bit_identical"),
    Break("copy-without-sums", CACHE, "tensors.insert(tensors.end(), { sums.k, sums.v });", "", "test_copies_are_bit_identical"),
    Break("copy-without-split-rows", CACHE, "tensors.insert(tensors.end(), { layer.k_local, layer.v_local });", "", "test_copies_are_bit_identical"),
    Break("copy-after-save", CACHE, "    copy_streams();\n\n    const uint64_t fp", "    const uint64_t fp", "test_a_copy_can_be_saved_at_once"),
    Break("copy-after-load", CACHE, "    copy_streams();\n\n    try {", "    try {", "test_a_copy_of_what_is_removed_next test_a_copy_is_dropped_by_a_clear"),
    Break("copy-of-a-part", CACHE, "streams[seq_id_dst].broken = true;", "", "test_copies_of_a_part_are_refused"),
    Break("copy-anywhere", CACHE, "if (seq_id < 0 || seq_id >= (llama_seq_id) n_stream) {", "if (false) {", "test_copies_of_no_sequence"),
    Break("copy-without-sliding-part", MEMORY, "        swa->seq_cp(seq_id_src, seq_id_dst, -1, -1);", "", "test_random_operations_on_sequences"),
    Break("copy-without-states", MEMORY, "        recr->seq_cp(seq_id_src, seq_id_dst, -1, -1);", "", "test_random_operations_on_sequences"),
    Break("copy-of-sliding-part-after-load", MEMORY, "        razor_sliding_cells::copy_streams(*swa);", "", "test_a_copy_with_sliding_windows_can_be_saved_at_once"),
    Break("state-of-first-stream", CACHE, "f(t, strm*t->nb[2] + ", "f(t, ", "test_state_of_a_sequence_in_another_one test_state_of_all_sequences"),
    Break("state-with-first-sums", CACHE, "f(sums.k, strm*sums.k->nb[2], ", "f(sums.k, 0, ", "test_state_of_a_sequence_in_another_one test_state_of_all_sequences"),
    Break("state-added-to-a-sequence", CACHE, "            clear_stream(seq_id);\n        }\n\n        llama_kv_cache::state_read", "        }\n\n        llama_kv_cache::state_read", "test_state_of_an_empty_sequence"),
    Break("state-of-empty-sequence-ignored", MEMORY, "        // upstream keeps the tokens of a sequence if its state is empty\n        clear_empty();", "", "test_state_of_an_empty_sequence_with_sliding_windows"),
    Break("state-of-other-streams", CACHE, "    add(get_n_stream());", "", "test_state_of_a_sequence_is_refused"),
    Break("state-in-no-sequence", CACHE, "if (first + n_read > n_stream) {", "if (false) {", "test_state_of_a_sequence_is_refused"),
    Break("state-clears-all", CACHE, "        } else {\n            clear_stream(seq_id);\n        }\n        throw;", "        } else {\n            clear(true);\n        }\n        throw;", "test_damaged_state_of_a_sequence"),
    Break("abort-of-all-sequences", CACHE, "            clear_stream(strm);\n\n            return;", "            clear(false);\n\n            return;", "test_abort_that_loses_a_sequence"),
    # states
    Break("state-without-sums", CACHE, "[&](ggml_tensor * t, size_t offset, size_t size) { io.read_tensor(t, offset, size); }", "[&](ggml_tensor * t, size_t offset, size_t size) { if (t->ne[1] == N_SLOTS) { std::vector<uint8_t> b(size); io.read(b.data(), size); } else { io.read_tensor(t, offset, size); } }",
          "test_a_state_after_a_prompt test_state_continues_bit_identically test_state_in_another_process test_state"),
    Break("state-of-other-heads", CACHE, "        for (const uint32_t h : plan.retrieval[il]) {\n            add(h);\n        }", "", "test_state_of_another_plan_is_refused"),
    Break("state-of-other-window", CACHE, "        add(group.window);\n        add(group.block);", "", "test_state_of_another_plan_is_refused test_state"),
    Break("state-of-stock", CACHE, "if (magic != RAZOR_STATE_MAGIC) {", "if (false) {", "test_stock_state_is_refused"),
    Break("state-unchecked", CACHE, "if (!sane) {", "if (false) {", "test_damaged_states_do_no_harm"),
    # bytes
    Break("more-bytes", CACHE, "ggml_new_tensor_3d(ctx, type_v, n_embd_v, plan.n_rows(il), n_strm)", "ggml_new_tensor_3d(ctx, type_v, n_embd_v, plan.n_rows(il) + 4*plan.groups[0].cells, n_strm)",
          "test_bytes_at_long_contexts test_bytes_of_masks test_bytes_of_other_types test_bytes_where_cells_are_rounded_up test_bytes_of_mixed_types_and_no_offload test_resident_memory_agrees"),
    Break("bytes-not-counted", RAZOR, "res += size;", "res += size/2;", "test_full_cache test_context_size_is_padded_alike"),
    Break("folded-miscounted", RAZOR, "res.n_folded   = res.frontier - kv->get_plan().sink_tokens;", "res.n_folded   = res.frontier;", "test_sequence_statistics"),
    Break("active-without-saving", PLAN, "if (window > 0 && cells < n_ctx) {", "if (window > 0) {", "test_window_that_saves_nothing test_window_that_saves_nothing_is_bit_identical_to_stock"),
    Break("active-without-local-heads", PLAN, "if (plan.groups.empty()) {", "if (false) {", "test_all_retrieval_heads_are_bit_identical_to_stock"),
    Break("nothing-saved-not-noticed", PLAN, "window > 0 && cells < n_ctx", "window > 0 && cells + 256 < n_ctx", "test_least_that_is_saved"),
    # several windows
    Break("groups-merged-where-it-costs-most", PLAN, "if (cost(it) < cost(best)) {", "if (cost(it) > cost(best)) {", "test_bytes_of_any_scopes test_scopes_equal_the_reference"),
    Break("groups-not-rounded", PLAN, "window = (window + res.block - 1)/res.block*res.block;", "", "test_bytes_of_any_scopes"),
    Break("groups-fold-as-the-first", GRAPH, "groups[i_group];\n    const auto & step  = get_step().groups[i_group];", "groups[0];\n    const auto & step  = get_step().groups[i_group];", "test_scopes_equal_the_reference test_any_scopes_equal_the_reference test_attention_with_several_windows"),
    Break("groups-mask-of-the-first", GRAPH, "order.first[i + 1], groups[i].mask);", "order.first[i + 1], groups[0].mask);", "test_scopes_equal_the_reference test_other_types_are_as_exact_as_with_one_window"),
    Break("groups-concatenated-in-another-order", GRAPH, "order.sequence = sorted;", "", "test_scopes_equal_the_reference"),
    Break("groups-end-with-the-largest-window", FRONTIER, "groups.back().frontier_end(pos)", "groups.front().frontier_end(pos)", "test_scopes_equal_the_reference"),
    Break("groups-rolled-back-by-the-first", CACHE, "        if (frontier < st.groups[g].frontier && !can_unfold(st, g, frontier)) {", "        if (g == 0 && frontier < st.groups[g].frontier && !can_unfold(st, g, frontier)) {", "test_a_rollback_needs_every_group"),
    Break("groups-state-of-other-heads", CACHE, "            for (const uint32_t h : plan.local[il][g]) {\n                add(h);\n            }", "", "test_state_of_exchanged_windows_is_refused"),
    Break("groups-counted-by-the-largest", RAZOR, "groups.back().frontier;", "groups.front().frontier;", "test_statistics_are_of_the_smallest_window"),
    Break("groups-by-version-1", PROFILE, "    if (use_scope) {", "    if (id_scope >= 0) {", "test_scopes_of_the_metadata"),
    Break("groups-despite-a-window", PLAN, "if (scope.empty() || profile.window > 0) {", "if (scope.empty()) {", "test_scopes_of_the_metadata"),
    Break("groups-of-any-scope", PROFILE, "        if ((scope[i] == 0) != (mask[i] == 1)) {", "        if (false) {", "test_bad_scopes_are_refused"),
    Break("groups-copied", GRAPH, "cur = ggml_concat(ctx0, cur, outs[order.sequence[i]], 0);", "cur = ggml_concat(ctx0, cur, ggml_cont(ctx0, outs[order.sequence[i]]), 0);", "test_nodes_of_another_group"),
    Break("groups-without-compensation", PLAN, "profile.compensation ? llama_razor_group::N_COMP : 0;", "profile.compensation && scope.empty() ? llama_razor_group::N_COMP : 0;", "test_scopes_of_one_window_are_that_window"),
    # ALiBi
    Break("alibi-slopes-in-the-order-of-groups", GRAPH, "data = std::copy_n(values.begin() + h*n_gqa, n_gqa, data);", "data = std::copy_n(values.begin() + (data - ((float *) slopes->data + order.offs_slopes)) + 0*h, n_gqa, data);", "test_alibi_scopes_equal_the_reference test_any_alibi_scopes_equal_the_reference"),
    Break("alibi-slopes-of-the-first-heads", GRAPH, "(order.offs_slopes + first)*slope->nb[0]", "(order.offs_slopes + 0*first)*slope->nb[0]", "test_alibi_scopes_equal_the_reference test_other_types_with_alibi_are_as_exact_as_a_full_cache"),
    Break("alibi-slopes-of-the-first-layer", GRAPH, "order.offs_slopes = n_slopes;", "order.offs_slopes = 0;", "test_alibi_scopes_equal_the_reference"),
    Break("alibi-slopes-of-the-first-kv-head", ATTN, "op.slopes.data() + head", "op.slopes.data()", "test_alibi_scopes_equal_the_reference test_a_full_cache_with_alibi_equals_the_reference"),
    Break("alibi-slope-of-the-first-query-head", KERNEL, "t.slopes[i % n_gqa]", "t.slopes[0]", "test_alibi_scopes_equal_the_reference test_a_full_cache_with_alibi_equals_the_reference"),
    Break("alibi-slopes-of-a-power-of-two", ATTN, "h < n ? powf(m0, h + 1) : powf(m1, 2*(h - n) + 1)", "powf(m0, h + 1)", "test_alibi_scopes_equal_the_reference"),
    Break("alibi-full-cache-without-slopes", FULL, "    attn.slopes   = razor_attn_slopes(q->ne[1], g.hparams.f_max_alibi_bias);\n", "", "test_a_full_cache_with_alibi_equals_the_reference"),
    Break("alibi-without-sinks", GRAPH, "p < std::min(group.sink_tokens, n)", "p < 0", "test_alibi_scopes_equal_the_reference"),
    Break("alibi-without-distances", GRAPH, "                if (hparams.use_alibi) {", "                if (false) {", "test_alibi_scopes_equal_the_reference"),
    Break("alibi-flash-attention-lost", GRAPH, "hparams.use_alibi && order.sequence.size() > 1;", "hparams.use_alibi;", "test_alibi_window_that_holds_everything_equals_stock"),
    Break("alibi-next-frontier", GRAPH, "for (uint32_t p = step.frontier; p < n; ++p) {", "for (uint32_t p = step.frontier + 1; p < n; ++p) {", "test_alibi_scopes_equal_the_reference test_alibi_window_that_holds_everything_equals_stock"),
    Break("alibi-rollback-refused", CACHE, "    if (plan.n_comp > 0 && st.groups[i_group].frontier_prev", "    if (st.groups[i_group].frontier_prev", "test_alibi_rollback"),
    Break("alibi-state-of-other-heads", CACHE, "            for (const uint32_t h : plan.local[il][g]) {\n                add(h);\n            }\n", "", "test_alibi_state"),
    Break("alibi-abort-keeps-tokens", CACHE, "    llama_kv_cache::seq_rm(seq_id, p0, -1);\n}\n\nvoid llama_kv_cache_razor::seq_cp", "}\n\nvoid llama_kv_cache_razor::seq_cp", "test_alibi_abort"),
    Break("alibi-more-bytes", CACHE, "ggml_new_tensor_3d(ctx, type_k, n_embd_k, plan.n_rows(il), n_strm)", "ggml_new_tensor_3d(ctx, type_k, n_embd_k, plan.n_rows(il) + 256, n_strm)", "test_bytes_of_alibi_scopes"),
    Break("alibi-scopes-not-read", PROFILE, "version == RAZOR_VERSION_SCOPE || res->alibi;", "version == RAZOR_VERSION_SCOPE;", "test_alibi_scopes_of_the_metadata test_alibi_is_refused_by_name"),
    Break("alibi-compensation-accepted", PLAN, "    if (hparams.use_alibi && profile->compensation) {", "    if (false) {", "test_alibi_is_refused_by_name"),
    Break("alibi-in-any-model", PLAN, "    if (heads->alibi && !hparams.use_alibi) {", "    if (false) {", "test_alibi_is_refused_by_name"),
    Break("alibi-on-devices", CACHE, "layer.device_batch && n_groups <= 1 && !hparams_model.use_alibi;", "layer.device_batch && n_groups <= 1;", "test_any_alibi_scopes_equal_the_reference", naive=True),
    # types of local heads
    Break("types-k-of-the-context", PLAN, "profile->type_k_local < 0 ? params.type_k :", "true ? params.type_k :", "test_rows_have_the_types_of_their_heads test_any_types_equal_the_reference test_bytes_of_any_types"),
    Break("types-unset-v-is-f32", PLAN, "profile->type_v_local < 0 ? params.type_v :", "profile->type_v_local < 0 ? GGML_TYPE_F32 :", "test_the_same_types_change_nothing"),
    Break("types-without-flash-attention", PLAN, "ggml_is_quantized(types.v) && (!cparams.flash_attn || cparams.auto_fa)", "false", "test_flash_attention_is_needed"),
    Break("types-of-any-head-size", PLAN, "plan.n_local(il) > 0 && (d_k %", "false && (d_k %", "test_head_sizes_must_fit"),
    Break("types-of-any-number", PROFILE, '            razor_check_type("type_k_local", params->type_k_local);\n', "", "test_other_numbers_are_refused"),
    Break("types-not-in-the-plan", CACHE, "if (types == &plan.types || !(*types == plan.types)) {", "if (types == &plan.types) {", "test_a_state_continues_and_other_types_are_refused"),
    Break("types-read-as-those-of-retrieval-heads", ATTN, "i_group > 0 ? op.src_local     : 1", "1", "test_rows_have_the_types_of_their_heads test_layers_with_many_windows_run_upstreams_attention"),
    Break("types-folded-elsewhere", GRAPH, "view_local(g.ctx0, layer, layer.k_local, i_group), sums.k);", "view_local(g.ctx0, layer, layer.k, i_group), sums.k);", "test_upstreams_operations_read_them_too"),
    Break("types-rows-of-other-heads", GRAPH, "order.first[k]*n_tokens + i*heads_kv.size() + j :", "order.first[k]*n_tokens + i*heads_kv.size() + (heads_kv.size() - 1 - j) :", "test_rows_have_the_types_of_their_heads"),
    Break("types-not-gathered", GRAPH, "    if (!order.identity) {\n        cur = build_gather(g, layer, cur, order.offs_kv);\n    }\n\n    for", "    for", "test_rows_have_the_types_of_their_heads test_upstreams_operations_read_them_too"),
    Break("types-not-rotated", CACHE, "const bool any_k = ggml_is_quantized(plan.types.k) || ggml_is_quantized(plan.types_local.k);", "const bool any_k = ggml_is_quantized(plan.types_local.k);", "test_rows_have_the_types_of_their_heads test_any_types_equal_the_reference"),
    Break("types-always-upstreams-attention", CACHE, "(!split || (n_groups", "(!split && (n_groups", "test_nodes_of_a_split_layer test_layers_with_many_windows_run_upstreams_attention"),
    Break("types-of-too-many-windows", CACHE, "n_groups <= RAZOR_ATTN_MAX_SPLIT", "n_groups <= 4", "test_layers_with_many_windows_run_upstreams_attention"),
    Break("types-without-sinks", ATTN, "    if (sinks && n_chunks == 1) {", "    if (k_local) {\n        sinks = nullptr;\n    }\n    if (sinks && n_chunks == 1) {", "test_sinks_and_caps_of_split_layers"),
    # stock behavior
    Break("razor-without-metadata", PROFILE, "    if (!any) {\n        return nullptr;\n    }", "    if (!any) {\n        auto res = std::make_shared<llama_razor_profile>();\n        res->window_min = 32;\n        res->window_divisor = 0;\n        res->retrieval.resize(llama_razor_n_kv_heads(arch, hparams));\n        return res;\n    }",
          "test_supported_arch_without_metadata test_other_arch_without_metadata test_two_sequences_without_metadata test_rollback_and_state_without_metadata"),
    Break("switch-ignored", PROFILE, 'return env && strcmp(env, "") != 0 && strcmp(env, "0") != 0;', "(void) env; return false;", "test_environment_switch test_switched_off_malformed_metadata_is_not_read"),
    Break("switch-stuck", PROFILE, 'return env && strcmp(env, "") != 0 && strcmp(env, "0") != 0;', "(void) env; return true;", "test_environment_switch_not_set test_metadata_and_override_are_the_same"),
    Break("off-ignored", PLAN, "if (!profile || !profile->enabled) {", "if (!profile) {", "test_override_off test_razor_off"),
    Break("override-kept", PROFILE, "        razor_override.reset();", "", "test_override_is_dropped"),
    # refusals
    Break("types-unchecked", PROFILE, "    if (found != expected) {", "    if (false) {", "test_malformed_metadata test_huge_mask test_flipped_bits"),
    Break("keys-not-seen", PROFILE, '"razor.", 6) == 0', '"razor.version", 13) == 0', "test_only_an_unknown_razor_key"),
    Break("too-strict", PROFILE, "    if (val < min || val > max) {", "    if (val <= min || val > max) {", "test_valid_metadata_is_accepted"),
    Break("ranges-unchecked", PROFILE, "    if (val < min || val > max) {", "    if (false) {", "test_bad_override test_malformed_metadata"),
    Break("version-unchecked", PROFILE, "    if (version != RAZOR_VERSION && version != RAZOR_VERSION_SCOPE) {", "    if (false) {", "test_malformed_metadata"),
    Break("unsupported-accepted", PLAN, "    if (!unsupported.empty()) {", "    if (false) {", "test_unsupported_architecture test_unsupported_context test_hybrids_with_sliding_windows_are_refused test_refused_by_name"),
    Break("supported-refused", PLAN, "if (hparams.indexer_head_size > 0) ", "if (hparams.indexer_head_size == 0) ", "test_other_architectures_run"),
    Break("non-causal-accepted", CACHE, "    if (!cparams.causal_attn) {", "    if (false) {", "test_non_causal_attention_after_creation"),
    Break("sizes-unchecked", RAZOR, "if (stats->size != sizeof(T)) {", "if (false) {", "test_struct_sizes_are_checked"),
    Break("other-api-version", RAZOR, "return LLAMA_RAZOR_API_VERSION;", "return 99;", "test_version_and_build_info"),
]  # fmt: skip

# native tests that no break of native/src can make fail
NO_BREAK = {
    "test_matrix_covers_what_it_says": "checks the tests' own cases",
    "test_tight_plans_are_tight": "checks the tests' own plans",
    "test_header_constants_match": "compares Python with a header",
    "test_all_architectures_read_prompts": "the slow form of test_architectures_read_prompts",
    "test_the_reference_of_prompts_differs_from_both_others": "checks the reference itself",
    "test_sizes_of_the_structures": "compares Python with Python",
    "test_states_and_rollbacks": "operations of upstream's cache, which the patches do not change",
    "test_patches_stay_small": "counts lines",
    "test_nodes_added_per_layer_on_devices": "needs a device",
    "test_attention_with_the_cache_in_main_memory": "needs a device",
    "test_lying_array_lengths": "upstream's GGUF reader refuses these before our code sees them",
    "test_truncated_files": "the same",
    "test_random_operations_on_a_tiny_model": "a fuzzer, whose findings become tests of their own",
    "test_random_operations_on_each_memory": "a fuzzer, whose findings become tests of their own",
    "test_servers_compute_the_same_logits": "compares the same code on two devices",
    "test_full_caches_on_servers": "the same",
    "test_some_layers_stay_on_this_machine": "the same",
    "test_the_cache_of_layers_on_servers_is_there": "upstream chooses the buffers",
    "test_second_sequence_in_a_batch": "upstream's batch check comes before ours, n_seq_max is 1",
}


def check_table() -> None:
    """Check that every text occurs once in its file, and that no native test is missing.

    Every test function that runs without a device must be in BREAKS or in NO_BREAK.
    """
    for file, old, new in [*NAIVE, *((b.file, b.old, b.new) for b in BREAKS)]:
        replace_once(file, (SOURCES / file).read_text(), old, new)
    broken_tests = {test for broken in BREAKS for test in broken.tests.split()}
    for test in sorted(broken_tests):
        file_of(test)
    named = broken_tests | set(NO_BREAK)
    for path in sorted((ROOT / "tests/native").glob("test_native_*.py")):
        if path.name.startswith("test_native_device"):
            continue
        for test in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE):
            if test not in named:
                raise SystemExit(f"{path.name}: {test} is in neither BREAKS nor NO_BREAK")


def main(patterns: list[str]) -> int:
    check_table()
    chosen = [b for b in BREAKS if not patterns or any(p in b.name for p in patterns)]
    unnoticed = 0
    with native_build.locked("broken-build") as tree:
        for broken in chosen:
            changes = NAIVE if broken.naive else []
            copy_sources(tree, [*changes, (broken.file, broken.old, broken.new)])
            lib = build(tree)
            for test in broken.tests.split():
                verdict = run(lib, test)
                unnoticed += verdict == "NOT NOTICED"
                print(f"{broken.name}: {test}: {verdict}", flush=True)
    print(f"{len(chosen)} breaks, {unnoticed} times not noticed", flush=True)
    return 1 if unnoticed else 0


def copy_sources(tree: Path, changes: Iterable[tuple[str, str, str]] = ()) -> None:
    """Copy the native sources to `tree`.

    A change is a file of native/src, a text that occurs in it once, and its replacement.
    """
    texts = {
        file.relative_to(ROOT): file.read_text()
        for file in [ROOT / "CMakeLists.txt", *(ROOT / "native").rglob("*")]
        if file.is_file()
    }
    src = SOURCES.relative_to(ROOT)
    texts[src / "naive_batch.h"] = (ROOT / "tests/tools/naive_batch.h").read_text()
    for file, old, new in changes:
        texts[src / file] = replace_once(file, texts[src / file], old, new)
    for path in (tree / "native").rglob("*"):  # CMake would compile a file that was moved since
        if path.is_file() and path.relative_to(tree) not in texts:
            path.unlink()
    for name, text in texts.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        write_if_changed(tree / name, text)


def replace_once(file: str, text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        raise SystemExit(
            f"this text occurs {text.count(old)} times in {file}, expected once:\n{old}"
        )
    return text.replace(old, new)


def write_if_changed(path: Path, text: str) -> None:
    """Write a file unless it is unchanged, so that unchanged files are not compiled again."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def file_of(test: str) -> Path:
    """Return the file of a native test function."""
    files = [
        path
        for path in (ROOT / "tests/native").glob("test_native_*.py")
        if f"def {test}(" in path.read_text()
    ]
    if len(files) != 1:
        raise SystemExit(f"there are {len(files)} test functions named {test}, expected one")
    return files[0]


def build(tree: Path) -> Path:
    native_build.build(tree / "build", source=tree)
    installed = tree / "installed"
    shutil.rmtree(installed, ignore_errors=True)
    return native_build.install(tree / "build", installed)


def run(lib: Path, test: str) -> str:
    """Return the result of a test function with the library, up to its first failing case."""
    env = os.environ | {"RAZOR_LOCAL_LIB": str(lib), "LLAMA_CPP_LIB_PATH": str(lib)}
    file = file_of(test)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"{file}::{test}"],
        capture_output=True, text=True, env=env, cwd=ROOT,
    )  # fmt: skip
    if done.returncode not in (0, 1) and done.returncode > 0 and "Fatal" not in done.stderr:
        raise SystemExit(f"pytest failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    if done.returncode < 0 or "Fatal Python error" in done.stderr:
        return "ends the process (an assertion of the library)"
    return "fails" if done.returncode else "NOT NOTICED"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
