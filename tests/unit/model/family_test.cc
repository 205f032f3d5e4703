// From the small files of a folder to a ModelSpec.
#include "worker/model/family.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "worker/model/checkpoint_facts.h"

namespace cinnabar {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

json QwenConfig(const std::string& architecture) {
  return {{"architectures", {architecture}},
          {"hidden_size", 896},
          {"intermediate_size", 4864},
          {"num_hidden_layers", 24},
          {"num_attention_heads", 14},
          {"num_key_value_heads", 2},
          {"vocab_size", 151936},
          {"rms_norm_eps", 1e-6},
          {"rope_theta", 1000000.0},
          {"max_position_embeddings", 32768},
          {"hidden_act", "silu"},
          {"tie_word_embeddings", true},
          {"eos_token_id", 151643}};
}

json LladaConfig() {
  return {{"architectures", {"LLaDAModelLM"}},
          {"d_model", 4096},
          {"n_layers", 32},
          {"n_heads", 32},
          {"n_kv_heads", 32},
          {"mlp_hidden_size", 12288},
          {"mlp_ratio", 4},
          {"vocab_size", 126464},
          {"embedding_size", 126464},
          {"max_sequence_length", 4096},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", 500000.0},
          {"weight_tying", false},
          {"activation_type", "silu"},
          {"block_type", "llama"},
          {"layer_norm_type", "rms"},
          {"eos_token_id", 126081},
          {"mask_token_id", 126336}};
}

json SeddConfig() {
  return {{"tokens", 50257},
          {"graph", {{"type", "absorb"}}},
          {"noise", {{"type", "loglinear"}, {"sigma_min", 1e-4}, {"sigma_max", 20}}},
          {"model",
           {{"hidden_size", 768},
            {"n_blocks", 12},
            {"n_heads", 12},
            {"cond_dim", 128},
            {"length", 1024},
            {"scale_by_sigma", true}}}};
}

json MdlmConfig() {
  return {{"architectures", {"MDLM"}},
          {"hidden_dim", 768},
          {"cond_dim", 128},
          {"n_blocks", 12},
          {"n_heads", 12},
          {"vocab_size", 50258},
          {"model_length", 1024},
          {"time_conditioning", false}};
}

absl::StatusOr<ModelSpec> Spec(const json& config, CheckpointTexts texts = {}) {
  texts.config = config.dump();
  const absl::StatusOr<CheckpointFacts> facts = ReadCheckpointFacts(texts, "here");
  if (!facts.ok()) return facts.status();
  return ReadModelSpec(*facts);
}

std::string Error(const json& config, const CheckpointTexts& texts = {}) {
  const absl::StatusOr<ModelSpec> spec = Spec(config, texts);
  return spec.ok() ? "" : std::string(spec.status().message());
}

json With(json config, const std::string& key, json value) {
  config[key] = std::move(value);
  return config;
}

json Without(json config, const std::string& key) {
  config.erase(key);
  return config;
}

CheckpointTexts TokenizerWith(const std::vector<std::pair<std::string, int>>& added) {
  json tokens = json::array();
  for (const auto& [content, id] : added) tokens.push_back({{"id", id}, {"content", content}});
  const json file = {{"added_tokens", tokens},
                     {"model", {{"type", "BPE"}, {"vocab", {{"a", 0}, {"b", 1}}}}}};
  return {.tokenizer = file.dump()};
}

TEST(FamilyTest, DreamShifts) {
  const absl::StatusOr<ModelSpec> spec = Spec(QwenConfig("DreamModel"));
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->traits.family, "dream");
  EXPECT_TRUE(spec->traits.shift_logits);
  EXPECT_TRUE(spec->qkv_bias);
  EXPECT_FALSE(spec->qk_norm);
  EXPECT_EQ(spec->traits.mask_token, 151666);  // of the published model, when nothing says
  EXPECT_EQ(spec->traits.default_sampler, "entropy");
  EXPECT_EQ(spec->head_dim, 64);
}

TEST(FamilyTest, TheBlockCausalDreamIsAnotherFamily) {
  const absl::StatusOr<ModelSpec> spec =
      Spec(With(QwenConfig("DreamForCausalLM"), "model_type", "Dream"));
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_FALSE(spec->traits.shift_logits);
  EXPECT_FALSE(spec->qkv_bias);
  EXPECT_TRUE(spec->qk_norm);
  EXPECT_EQ(spec->traits.causal_block_length, 32);
  EXPECT_EQ(spec->traits.mask_token, 151669);
}

TEST(FamilyTest, APlainQwenNeedsAMaskToken) {
  EXPECT_THAT(Error(QwenConfig("Qwen2ForCausalLM")),
              AllOf(HasSubstr("autoregressive"), HasSubstr("mask_token_id"),
                    HasSubstr("here/config.json")));
  EXPECT_EQ(Spec(QwenConfig("Qwen2ForCausalLM")).status().code(), absl::StatusCode::kUnimplemented);
  const absl::StatusOr<ModelSpec> spec = Spec(
      QwenConfig("Qwen2ForCausalLM"), TokenizerWith({{"<M>", 151665}, {"<|im_end|>", 151645}}));
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->traits.family, "open_dcoder");
  EXPECT_EQ(spec->traits.mask_token, 151665);
  EXPECT_TRUE(spec->traits.shift_logits);
  EXPECT_THAT(spec->traits.eos_tokens, ElementsAre(151643, 151645));
  EXPECT_EQ(Spec(With(QwenConfig("Qwen2ForCausalLM"), "mask_token_id", 7))->traits.mask_token, 7);
}

TEST(FamilyTest, A2dAppendsItsMaskToken) {
  const absl::StatusOr<ModelSpec> spec =
      Spec(QwenConfig("A2DQwen3LMHeadModel"),
           TokenizerWith({{"<|im_end|>", 151645}, {"</think>", 151668}}));
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->traits.mask_token, 151669);
  EXPECT_FALSE(spec->traits.shift_logits);
  EXPECT_TRUE(spec->qk_norm);
  EXPECT_EQ(spec->traits.causal_block_length, 0);
  EXPECT_EQ(spec->traits.default_sampler, "low_confidence");
  EXPECT_THAT(Error(QwenConfig("A2DQwen3LMHeadModel")), HasSubstr("mask_token_id"));
  const json full = With(QwenConfig("A2DQwen3LMHeadModel"), "vocab_size", 151669);
  EXPECT_THAT(Error(full, TokenizerWith({{"</think>", 151668}})), HasSubstr("mask token 151669"));
}

TEST(FamilyTest, A2dWithABlockSizeIsBlockCausal) {
  for (const char* key : {"block_size", "bd_size"}) {
    json config = With(QwenConfig("A2DQwen2LMHeadModel"), "mask_token_id", 151665);
    config[key] = 32;
    const absl::StatusOr<ModelSpec> spec = Spec(config);
    ASSERT_TRUE(spec.ok()) << spec.status();
    EXPECT_EQ(spec->traits.causal_block_length, 32);
    EXPECT_EQ(spec->traits.default_sampler, "block_dynamic");
    EXPECT_TRUE(spec->qkv_bias);
  }
}

TEST(FamilyTest, A2dLlamaReadsItsBiases) {
  json config = With(QwenConfig("A2DLlamaLMHeadModel"), "mask_token_id", 5);
  EXPECT_FALSE(Spec(config)->qkv_bias);
  config["attention_bias"] = config["mlp_bias"] = true;
  const absl::StatusOr<ModelSpec> spec = Spec(config);
  ASSERT_TRUE(spec.ok());
  EXPECT_TRUE(spec->qkv_bias && spec->o_bias && spec->mlp_bias && !spec->qk_norm);
}

TEST(FamilyTest, LladaKeepsTheEndOfATurnApart) {
  const absl::StatusOr<ModelSpec> spec =
      Spec(LladaConfig(), TokenizerWith({{"<|endoftext|>", 126081}, {"<|eot_id|>", 126348}}));
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_THAT(spec->traits.eos_tokens, ElementsAre(126081));
  EXPECT_EQ(spec->traits.eot_token, 126348);
  EXPECT_EQ(spec->traits.mask_token, 126336);
  EXPECT_EQ(spec->traits.tokenizer_size, 126349);
  EXPECT_EQ(spec->names.gate, "ff_proj");
  EXPECT_EQ(Spec(Without(LladaConfig(), "mlp_hidden_size"))->mlp_dim, 16384);
  EXPECT_EQ(Spec(With(With(LladaConfig(), "n_kv_heads", nullptr), "multi_query_attention", true))
                ->num_kv_heads,
            1);
  EXPECT_EQ(Spec(Without(LladaConfig(), "mask_token_id"))->traits.mask_token, 126336);
}

TEST(FamilyTest, SdarIsBlockCausal) {
  const absl::StatusOr<ModelSpec> spec =
      Spec(With(QwenConfig("SDARForCausalLM"), "block_size", 16));
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->traits.causal_block_length, 16);
  EXPECT_EQ(spec->traits.mask_token, 151669);
  EXPECT_EQ(Spec(QwenConfig("SDARForCausalLM"))->traits.causal_block_length, 4);
}

TEST(FamilyTest, SeddIsRecognisedWithoutAnArchitecture) {
  const absl::StatusOr<ModelSpec> absorb = Spec(SeddConfig());
  ASSERT_TRUE(absorb.ok()) << absorb.status();
  EXPECT_EQ(absorb->traits.vocab_size, 50258);
  EXPECT_EQ(absorb->traits.mask_token, 50257);
  EXPECT_TRUE(absorb->scale_by_sigma);
  EXPECT_EQ(absorb->traits.sigma_max, 0);  // log-linear
  EXPECT_THAT(absorb->traits.eos_tokens, ElementsAre(50256));
  json config = SeddConfig();
  config["graph"]["type"] = "uniform";
  config["noise"]["type"] = "geometric";
  EXPECT_THAT(Error(config), HasSubstr("scale_by_sigma"));
  config["model"]["scale_by_sigma"] = false;
  const absl::StatusOr<ModelSpec> uniform = Spec({{"config", config}});  // as a wrapper keeps it
  ASSERT_TRUE(uniform.ok()) << uniform.status();
  EXPECT_EQ(uniform->traits.vocab_size, 50257);
  EXPECT_EQ(uniform->traits.mask_token, -1);
  EXPECT_EQ(uniform->traits.parameterization, Parameterization::kUniformScore);
  EXPECT_EQ(uniform->traits.sigma_max, 20);
}

TEST(FamilyTest, MdlmReadsCondDimFromItsConfig) {
  const absl::StatusOr<ModelSpec> spec = Spec(MdlmConfig());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->traits.mask_token, 50257);
  EXPECT_FALSE(spec->traits.conditioned_on_sigma);
  EXPECT_THAT(Error(Without(MdlmConfig(), "cond_dim")), HasSubstr("cond_dim: missing"));
  EXPECT_TRUE(Spec(With(MdlmConfig(), "time_conditioning", true))->traits.conditioned_on_sigma);
}

TEST(FamilyTest, WhatIsNotComputedIsRefusedByName) {
  const json qwen = With(QwenConfig("DreamModel"), "mask_token_id", 1);
  const json llada = LladaConfig();
  const struct {
    json config;
    std::string field;
  } cases[] = {
      {With(qwen, "hidden_act", "gelu"), "hidden_act"},
      {With(qwen, "rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}}), "rope_scaling"},
      {With(qwen, "rope_scaling", {{"type", "linear"}, {"factor", 2.0}}), "rope_scaling"},
      {With(With(qwen, "use_sliding_window", true), "sliding_window", 4096), "use_sliding_window"},
      {With(qwen, "layer_types", {"full_attention", "sliding_attention"}), "layer_types"},
      {With(qwen, "partial_rotary_factor", 0.5), "partial_rotary_factor"},
      {With(qwen, "quantization_config", {{"bits", 4}}), "quantization_config"},
      {With(llada, "alibi", true), "alibi"},
      {With(llada, "activation_type", "gelu"), "activation_type"},
      {With(llada, "block_type", "sequential"), "block_type"},
      {With(llada, "layer_norm_type", "default"), "layer_norm_type"},
      {With(llada, "attention_layer_norm", true), "attention_layer_norm"},
      {With(llada, "include_bias", true), "include_bias"},
      {With(llada, "input_emb_norm", true), "input_emb_norm"},
      {With(llada, "scale_logits", true), "scale_logits"},
      {With(llada, "rope", false), "rope"},
      {With(llada, "clip_qkv", 8.0), "clip_qkv"},
      {With(llada, "block_group_size", 2), "block_group_size"},
      {With(MdlmConfig(), "causal", true), "causal"},
  };
  for (const auto& c : cases) {
    EXPECT_EQ(Spec(c.config).status().code(), absl::StatusCode::kUnimplemented) << c.field;
    EXPECT_THAT(Error(c.config), HasSubstr(absl::StrCat("here/config.json: ", c.field, ": ")));
  }
  EXPECT_TRUE(Spec(With(qwen, "rope_scaling", {{"rope_type", "default"}})).ok());
  EXPECT_EQ(Spec(With(Without(qwen, "rope_theta"), "rope_parameters",
                      {{"rope_type", "default"}, {"rope_theta", 5e5}}))
                ->rope_theta,
            5e5);
  EXPECT_TRUE(Spec(With(qwen, "sliding_window", 4096)).ok());  // there, and not used
}

TEST(FamilyTest, AWrongFieldIsNamed) {
  const json qwen = With(QwenConfig("DreamModel"), "mask_token_id", 1);
  const struct {
    json config;
    std::string message;
  } cases[] = {
      {Without(qwen, "hidden_size"), "hidden_size: missing"},
      {With(qwen, "hidden_size", nullptr), "hidden_size: missing"},
      {With(qwen, "hidden_size", "896"), "hidden_size: not an integer"},
      {With(qwen, "hidden_size", 896.5), "hidden_size: not an integer"},
      {With(qwen, "hidden_size", 0), "hidden_size: 0 is not in"},
      {With(qwen, "hidden_size", 1e18), "hidden_size"},
      {With(qwen, "vocab_size", 18446744073709551615U), "vocab_size"},
      {With(qwen, "num_hidden_layers", -1), "num_hidden_layers: -1 is not in"},
      {With(qwen, "num_attention_heads", 13), "13 heads do not divide"},
      {With(qwen, "num_key_value_heads", 3), "3 key-value heads do not divide"},
      {With(qwen, "head_dim", 63), "it is odd"},
      {With(qwen, "rms_norm_eps", "small"), "rms_norm_eps: not a number"},
      {With(qwen, "rope_theta", -1.0), "rope_theta: -1 is not in"},
      {With(qwen, "tie_word_embeddings", 1), "tie_word_embeddings: not true or false"},
      {With(qwen, "mask_token_id", 151936), "mask token 151936"},
      {With(qwen, "mask_token_id", -1), "mask_token_id: -1 is not in"},
      {With(qwen, "eos_token_id", {1, "2"}), "eos_token_id: not an integer"},
      {With(qwen, "architectures", 5), "architectures: not a string"},
      {With(qwen, "rope_scaling", 5), "rope_scaling: not an object"},
      {With(SeddConfig(), "graph", {{"type", "banded"}}), "graph: type"},
      {json::array(), "not an object"},
      {json::object(), "names no architecture"},
  };
  for (const auto& c : cases) EXPECT_THAT(Error(c.config), HasSubstr(c.message));
}

json Rnd1Config() {
  json config = QwenConfig("RND1");
  config.update({{"hidden_size", 2048},
                 {"num_hidden_layers", 48},
                 {"num_attention_heads", 32},
                 {"num_key_value_heads", 4},
                 {"head_dim", 128},
                 {"moe_intermediate_size", 768},
                 {"num_experts", 128},
                 {"num_experts_per_tok", 8},
                 {"norm_topk_prob", true},
                 {"tie_word_embeddings", false}});
  return config;
}

// LLaDA2.0-mini.
json Llada2Config() {
  return {{"architectures", {"LLaDA2MoeModelLM"}},
          {"hidden_size", 2048},
          {"intermediate_size", 5120},
          {"moe_intermediate_size", 512},
          {"num_hidden_layers", 20},
          {"num_attention_heads", 16},
          {"num_key_value_heads", 4},
          {"head_dim", 128},
          {"num_experts", 256},
          {"num_experts_per_tok", 8},
          {"n_group", 8},
          {"topk_group", 4},
          {"num_shared_experts", 1},
          {"first_k_dense_replace", 1},
          {"rope_theta", 600000},
          {"partial_rotary_factor", 0.5},
          {"rms_norm_eps", 1e-6},
          {"routed_scaling_factor", 2.5},
          {"score_function", "sigmoid"},
          {"vocab_size", 157184},
          {"max_position_embeddings", 32768},
          {"tie_word_embeddings", false},
          {"eos_token_id", 156892}};
}

TEST(FamilyTest, Llada22PredictsInsertionsAndDeletions) {
  EXPECT_EQ(Spec(Llada2Config())->traits.delete_token, -1);
  json config = Llada2Config();
  config["delete_token_id"] = 156930;
  config["split_token_id"] = 156931;
  const ModelSpec spec = *Spec(config);
  EXPECT_EQ(spec.traits.delete_token, 156930);
  EXPECT_EQ(spec.traits.split_token, 156931);
  const auto message = [&](const char* key, const json& value) {
    json broken = config;
    broken[key] = value;
    return std::string(Spec(broken).status().message());
  };
  EXPECT_THAT(message("delete_token_id", nullptr), HasSubstr("delete_token_id: missing"));
  EXPECT_THAT(message("split_token_id", nullptr), HasSubstr("split_token_id: missing"));
  EXPECT_THAT(message("split_token_id", 157184), HasSubstr("split_token_id: "));
  EXPECT_THAT(message("split_token_id", true), HasSubstr("split_token_id: "));
  EXPECT_THAT(message("split_token_id", 156930), HasSubstr("three different ids"));
  EXPECT_THAT(message("delete_token_id", 156895), HasSubstr("three different ids"));
}

json LladaMoeConfig() {
  return {{"architectures", {"LLaDAMoEModelLM"}},
          {"hidden_size", 2048},
          {"expert_intermediate_size", 1024},
          {"dense_intermediate_size", 8192},
          {"num_hidden_layers", 16},
          {"num_attention_heads", 16},
          {"num_key_value_heads", 16},
          {"moe_layer_freq", std::vector<int>(16, 1)},
          {"num_experts", 64},
          {"num_experts_per_tok", 8},
          {"qk_layernorm", true},
          {"rope_theta", 50000},
          {"rms_norm_eps", 1e-5},
          {"vocab_size", 157184},
          {"max_position_embeddings", 8192},
          {"tie_word_embeddings", false}};
}

// How many elements the forward pass reads.
int64_t NumParameters(const ModelSpec& spec) {
  int64_t total = 0;
  for (const ExpectedTensor& tensor : ExpectedTensors(spec)) {
    int64_t size = 1;
    for (const int64_t dimension : tensor.shape) size *= dimension;
    total += size;
  }
  return total;
}

TEST(FamilyTest, Rnd1IsAShiftedMixtureOfExperts) {
  const ModelSpec spec = *Spec(Rnd1Config());
  EXPECT_EQ(spec.traits.family, "rnd1");
  EXPECT_TRUE(spec.traits.shift_logits);
  EXPECT_EQ(spec.traits.causal_block_length, 0);
  EXPECT_EQ(spec.traits.mask_token, 151669);
  EXPECT_TRUE(spec.qk_norm);
  EXPECT_TRUE(spec.experts.renormalize);
  EXPECT_TRUE(HasExperts(spec, 0));
  EXPECT_EQ(NumParameters(spec), 30'532'122'624);  // Qwen3-30B-A3B
}

TEST(FamilyTest, SdarMoeIsBlockCausalAndObeysItsDenseLayers) {
  json config = Rnd1Config();
  config["architectures"] = {"SDARMoeForCausalLM"};
  config["decoder_sparse_step"] = 2;
  config["mlp_only_layers"] = {3};
  const ModelSpec spec = *Spec(config);
  EXPECT_EQ(spec.traits.family, "sdar_moe");
  EXPECT_EQ(spec.traits.causal_block_length, 4);
  EXPECT_FALSE(spec.traits.shift_logits);
  EXPECT_FALSE(HasExperts(spec, 0));
  EXPECT_TRUE(HasExperts(spec, 1));
  EXPECT_FALSE(HasExperts(spec, 3));
  EXPECT_TRUE(HasExperts(spec, 5));
}

TEST(FamilyTest, Llada2RotatesHalfOfAHeadAndGroupsItsExperts) {
  const ModelSpec spec = *Spec(Llada2Config());
  EXPECT_EQ(spec.traits.family, "llada2");
  EXPECT_EQ(spec.rotary_dim, 64);
  EXPECT_EQ(spec.traits.causal_block_length, 32);
  EXPECT_EQ(spec.traits.mask_token, 156895);
  EXPECT_EQ(spec.experts.score, RouterScore::kSigmoid);
  EXPECT_EQ(spec.experts.num_groups, 8);
  EXPECT_EQ(spec.experts.groups_per_token, 4);
  EXPECT_TRUE(spec.experts.bias);
  EXPECT_FALSE(spec.experts.bias_counts);
  EXPECT_FLOAT_EQ(spec.experts.scale, 2.5F);
  EXPECT_TRUE(spec.experts.renormalize);
  EXPECT_FALSE(Spec(With(Llada2Config(), "num_experts_per_tok", 1))->experts.renormalize);
  EXPECT_FALSE(HasExperts(spec, 0));
  EXPECT_TRUE(HasExperts(spec, 1));
  const std::vector<ExpectedTensor> tensors = ExpectedTensors(spec);
  const auto shape_of = [&](const std::string& name) {
    for (const ExpectedTensor& tensor : tensors) {
      if (tensor.name == name) return tensor.shape;
    }
    return std::vector<int64_t>{};
  };
  using Shape = std::vector<int64_t>;
  EXPECT_EQ(shape_of("model.layers.0.attention.query_key_value.weight"), (Shape{3072, 2048}));
  EXPECT_EQ(shape_of("model.layers.0.mlp.gate_proj.weight"), (Shape{5120, 2048}));
  EXPECT_EQ(shape_of("model.layers.1.mlp.gate.weight"), (Shape{256, 2048}));
  EXPECT_EQ(shape_of("model.layers.1.mlp.gate.expert_bias"), (Shape{256}));
  EXPECT_EQ(shape_of("model.layers.1.mlp.experts.255.down_proj.weight"), (Shape{2048, 512}));
  EXPECT_EQ(shape_of("model.layers.1.mlp.shared_experts.up_proj.weight"), (Shape{512, 2048}));
}

TEST(FamilyTest, LladaMoeTakesTheScoresAsTheyAre) {
  const ModelSpec spec = *Spec(LladaMoeConfig());
  EXPECT_EQ(spec.traits.family, "llada_moe");
  EXPECT_EQ(spec.traits.mask_token, 156895);
  EXPECT_FALSE(spec.experts.renormalize);
  EXPECT_TRUE(HasExperts(spec, 0));
  EXPECT_EQ(spec.experts.shared_mlp_dim, 0);
  json mixed = With(LladaMoeConfig(), "moe_layer_freq", std::vector<int>(16, 1));
  mixed["moe_layer_freq"][2] = 0;
  EXPECT_FALSE(HasExperts(*Spec(mixed), 2));
}

json DiffusionGemmaConfig() {
  json types = json::array();
  for (int i = 0; i < 30; ++i) types.push_back(i % 6 == 5 ? "full_attention" : "sliding_attention");
  const json rope = {
      {"full_attention",
       {{"partial_rotary_factor", 0.25}, {"rope_theta", 1e6}, {"rope_type", "proportional"}}},
      {"sliding_attention", {{"rope_theta", 1e4}, {"rope_type", "default"}}}};
  return {{"architectures", {"DiffusionGemmaForBlockDiffusion"}},
          {"canvas_length", 256},
          {"eos_token_id", {1, 106}},
          {"tie_word_embeddings", true},
          {"text_config",
           {{"vocab_size", 262144},
            {"hidden_size", 2816},
            {"intermediate_size", 2112},
            {"num_hidden_layers", 30},
            {"layer_types", types},
            {"num_attention_heads", 16},
            {"num_key_value_heads", 8},
            {"num_global_key_value_heads", 2},
            {"head_dim", 256},
            {"global_head_dim", 512},
            {"hidden_activation", "gelu_pytorch_tanh"},
            {"use_bidirectional_attention", "vision"},
            {"num_experts", 128},
            {"moe_intermediate_size", 704},
            {"top_k_experts", 8},
            {"sliding_window", 1024},
            {"final_logit_softcapping", 30.0},
            {"rms_norm_eps", 1e-6},
            {"rope_parameters", rope},
            {"max_position_embeddings", 262144}}}};
}

TEST(FamilyTest, DiffusionGemmaHasTwoKindsOfLayersAndNoMask) {
  const ModelSpec spec = *Spec(DiffusionGemmaConfig());
  const ModelTraits& traits = spec.traits;
  EXPECT_EQ(traits.family, "diffusion_gemma");
  EXPECT_EQ(traits.mask_token, -1);
  EXPECT_EQ(traits.parameterization, Parameterization::kUniformPrediction);
  EXPECT_TRUE(traits.causal_encoder);
  EXPECT_EQ(traits.causal_block_length, 256);
  EXPECT_EQ(traits.positions_max, 262144);
  EXPECT_THAT(traits.eos_tokens, ElementsAre(1, 106));
  EXPECT_EQ(traits.default_sampler, "gemma_renoise");
  EXPECT_EQ(spec.windows.window, 1024);
  EXPECT_EQ(spec.windows.full_rotary_angles, 64);
  EXPECT_EQ(spec.experts.experts_per_token, 8);
  const KvShape kv = KvShapeOf(spec, 10, KvReuse::kExact);
  EXPECT_EQ(kv.num_layers, 25);
  EXPECT_EQ(kv.num_other_layers, 5);
  EXPECT_EQ(kv.other_kv_heads, 2);
  EXPECT_EQ(kv.other_head_dim, 512);
  const std::vector<ExpectedTensor> tensors = ExpectedTensors(spec);
  const auto shape_of = [&](const std::string& name) {
    for (const ExpectedTensor& tensor : tensors) {
      if (tensor.name == name) return tensor.shape;
    }
    return std::vector<int64_t>{};
  };
  using Shape = std::vector<int64_t>;
  EXPECT_EQ(shape_of("model.decoder.layers.4.self_attn.v_proj.weight"), (Shape{2048, 2816}));
  EXPECT_EQ(shape_of("model.decoder.layers.5.self_attn.v_proj.weight"), (Shape{}));
  EXPECT_EQ(shape_of("model.decoder.layers.5.self_attn.k_proj.weight"), (Shape{1024, 2816}));
  EXPECT_EQ(shape_of("model.decoder.layers.5.self_attn.o_proj.weight"), (Shape{2816, 8192}));
  EXPECT_EQ(shape_of("model.decoder.layers.0.experts.gate_up_proj"), (Shape{128, 1408, 2816}));
  EXPECT_EQ(shape_of("model.decoder.layers.0.experts.down_proj"), (Shape{128, 2816, 704}));
  EXPECT_EQ(shape_of("model.encoder.language_model.layers.29.layer_scalar"), (Shape{1}));
  EXPECT_EQ(shape_of("model.decoder.self_conditioning.down_proj.weight"), (Shape{2816, 2112}));

  // As newer versions of the library write the heads.
  json newer = DiffusionGemmaConfig();
  json& text = newer["text_config"];
  text.erase("global_head_dim");
  text.erase("num_global_key_value_heads");
  for (int i = 5; i < 30; i += 6) {
    text["per_layer_config"][std::to_string(i)] = {{"head_dim", 512}, {"num_key_value_heads", 2}};
  }
  EXPECT_EQ(Spec(newer)->windows.full_head_dim, 512);
  EXPECT_EQ(Spec(newer)->windows.full_kv_heads, 2);
  text["per_layer_config"]["11"]["head_dim"] = 256;
  EXPECT_THAT(Error(newer), HasSubstr("per_layer_config"));
  // What is left out has the library's defaults; the last layer always sees everything.
  json bare = DiffusionGemmaConfig();
  bare["text_config"].erase("layer_types");
  bare["text_config"].erase("rope_parameters");
  bare["text_config"]["num_hidden_layers"] = 8;
  bare.erase("canvas_length");
  const ModelSpec defaults = *Spec(bare);
  EXPECT_THAT(defaults.windows.full_layers,
              ElementsAre(false, false, false, false, false, true, false, true));
  EXPECT_EQ(defaults.windows.full_rotary_angles, 64);
}

TEST(FamilyTest, WhatDiffusionGemmaDoesNotComputeIsRefusedByField) {
  const auto error = [](const std::string& key, json value) {
    json config = DiffusionGemmaConfig();
    config["text_config"][key] = std::move(value);
    return Error(config);
  };
  EXPECT_THAT(error("hidden_activation", "silu"), HasSubstr("hidden_activation"));
  EXPECT_THAT(error("attention_bias", true), HasSubstr("attention_bias"));
  EXPECT_THAT(error("use_bidirectional_attention", "all"),
              HasSubstr("use_bidirectional_attention"));
  EXPECT_THAT(error("layer_types", {"full_attention"}), HasSubstr("layer_types"));
  EXPECT_THAT(error("global_head_dim", 511), HasSubstr("global_head_dim"));
  EXPECT_THAT(error("num_global_key_value_heads", 3), HasSubstr("global_head_dim"));
  EXPECT_THAT(error("num_experts", 4), HasSubstr("num_experts_per_tok"));
  EXPECT_THAT(error("sliding_window", 0), HasSubstr("sliding_window"));
  EXPECT_THAT(error("rope_parameters", {{"sliding_attention", json::object()},
                                        {"full_attention", {{"rope_type", "yarn"}}}}),
              HasSubstr("rope_parameters"));
  EXPECT_THAT(Error(With(DiffusionGemmaConfig(), "tie_word_embeddings", false)),
              HasSubstr("tie_word_embeddings"));
  EXPECT_THAT(Error(Without(DiffusionGemmaConfig(), "text_config")), HasSubstr("text_config"));
}

TEST(FamilyTest, ExpertsThatDoNotFitAreRefusedByField) {
  EXPECT_THAT(Error(With(Llada2Config(), "n_group", 7)), HasSubstr("n_group"));
  EXPECT_THAT(Error(With(Llada2Config(), "topk_group", 9)), HasSubstr("topk_group"));
  EXPECT_THAT(Error(With(Llada2Config(), "partial_rotary_factor", 0.01)),
              HasSubstr("partial_rotary_factor"));
  EXPECT_THAT(Error(With(Llada2Config(), "expert_capacity", 3)), HasSubstr("expert_capacity"));
  EXPECT_THAT(Error(With(Llada2Config(), "score_function", "softmax")),
              HasSubstr("score_function"));
  EXPECT_THAT(Error(With(Rnd1Config(), "num_experts", 4)), HasSubstr("num_experts_per_tok"));
  EXPECT_THAT(Error(Without(Rnd1Config(), "num_experts")), HasSubstr("num_experts"));
  EXPECT_THAT(Error(With(Rnd1Config(), "num_experts_per_tok", 65)),
              HasSubstr("num_experts_per_tok"));
  EXPECT_THAT(Error(With(LladaMoeConfig(), "moe_layer_freq", {1, 0})), HasSubstr("moe_layer_freq"));
  EXPECT_THAT(Error(With(LladaMoeConfig(), "router_num_group", 2)), HasSubstr("router_num_group"));
  EXPECT_THAT(Error(With(LladaMoeConfig(), "routed_scaling_factor", 2)),
              HasSubstr("routed_scaling_factor"));
}

TEST(FamilyTest, FastDllmV2ShiftsInsideItsBlocks) {
  const json config = QwenConfig("Fast_dLLM_QwenForCausalLM");
  const ModelSpec spec = *Spec(config);
  EXPECT_EQ(spec.traits.family, "fast_dllm_v2");
  EXPECT_TRUE(spec.traits.shift_logits && spec.qkv_bias);
  EXPECT_EQ(spec.traits.causal_block_length, 32);
  EXPECT_EQ(spec.traits.mask_token, 151665);
  EXPECT_EQ(Spec(With(config, "bd_size", 16))->traits.causal_block_length, 16);
  EXPECT_THAT(Error(With(config, "bd_size", 0)), HasSubstr("bd_size"));
}

TEST(FamilyTest, Bd3lmIsMdlmInBlocks) {
  const json config = {{"architectures", {"BD3LM"}},
                       {"block_size", 16},
                       {"vocab_size", 50258},
                       {"model_length", 1024},
                       {"hidden_dim", 768},
                       {"cond_dim", 128},
                       {"n_blocks", 12},
                       {"n_heads", 12},
                       {"time_conditioning", false}};
  const ModelSpec spec = *Spec(config);
  EXPECT_EQ(spec.traits.family, "bd3lm");
  EXPECT_EQ(spec.traits.causal_block_length, 16);
  EXPECT_EQ(spec.traits.mask_token, 50257);
  EXPECT_EQ(spec.traits.positions_max, 1024);
  EXPECT_FALSE(spec.traits.conditioned_on_sigma);
  EXPECT_THAT(Error(With(config, "time_conditioning", true)), HasSubstr("time_conditioning"));
  EXPECT_THAT(Error(With(config, "adaln", false)), HasSubstr("adaln"));
  EXPECT_THAT(Error(Without(config, "block_size")), HasSubstr("block_size"));
}

TEST(FamilyTest, AnUnknownArchitectureIsToldWhatIsSupported) {
  const json config = {{"architectures", {"LlamaForCausalLM"}}};
  EXPECT_EQ(Spec(config).status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(Error(config),
              AllOf(HasSubstr("LlamaForCausalLM"), HasSubstr("supported are A2DQwen2LMHeadModel")));
}

TEST(FamilyTest, EndsComeFromBothConfigsAndIdsOutOfRangeAreDropped) {
  CheckpointTexts texts = TokenizerWith({{"<|im_end|>", 151645}});
  texts.generation_config = R"({"eos_token_id":[151645,151643,999999]})";
  const absl::StatusOr<ModelSpec> spec = Spec(QwenConfig("SDARForCausalLM"), texts);
  ASSERT_TRUE(spec.ok());
  EXPECT_THAT(spec->traits.eos_tokens, ElementsAre(151645, 151643));
}

TEST(CheckpointFactsTest, ReadsTokensFromEveryKindOfFile) {
  const auto facts = [](CheckpointTexts texts) {
    texts.config = "{}";
    return ReadCheckpointFacts(texts, "here");
  };
  EXPECT_EQ(facts({.vocab = R"({"a":0,"b":6})", .added_tokens = R"({"<M>":9})"})->tokenizer.size,
            10);
  EXPECT_EQ(
      TokenizerMask(facts({.vocab = R"({"a":0})", .added_tokens = R"({"<M>":9})"})->tokenizer), 9);
  const absl::StatusOr<CheckpointFacts> decoder = facts(
      {.tokenizer_config =
           R"({"mask_token":{"content":"[X]"},"added_tokens_decoder":{"7":{"content":"[X]"},"8":{"content":"<M>"}}})"});
  ASSERT_TRUE(decoder.ok()) << decoder.status();
  EXPECT_EQ(TokenizerMask(decoder->tokenizer),
            7);  // what is called the mask goes before what looks like one
  EXPECT_EQ(decoder->tokenizer.size, 9);
  // A token called `added_tokens` inside the vocabulary is a token.
  EXPECT_EQ(
      facts({.tokenizer = R"({"model":{"vocab":{"added_tokens":3,"id":4}}})"})->tokenizer.size, 5);

  for (const CheckpointTexts& broken :
       {CheckpointTexts{.tokenizer = R"({"added_tokens":[{"id":-1,"content":"a"}]})"},
        CheckpointTexts{.tokenizer = R"({"added_tokens":[{"id":99999999999,"content":"a"}]})"},
        CheckpointTexts{.tokenizer = "{"}, CheckpointTexts{.vocab = R"({"a":2147483647})"},
        CheckpointTexts{.tokenizer_config = "[]"},
        CheckpointTexts{.tokenizer_config = R"({"mask_token":3})"},
        CheckpointTexts{.tokenizer_config = R"({"added_tokens_decoder":{"x":{"content":"a"}}})"},
        CheckpointTexts{.tokenizer_config = R"({"added_tokens_decoder":{"1":3}})"},
        CheckpointTexts{.generation_config = R"({"eos_token_id":"x"})"}}) {
    const absl::StatusOr<CheckpointFacts> read = facts(broken);
    ASSERT_FALSE(read.ok());
    EXPECT_THAT(std::string(read.status().message()), HasSubstr("here/"));
  }
}

}  // namespace
}  // namespace cinnabar
