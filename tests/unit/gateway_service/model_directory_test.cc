// Which models there are, from what workers say.
#include "gateway/service/model_directory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "common/wire/model_traits_wire.h"
#include "tests/unit/gateway_api/served_model.h"

namespace cinnabar {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;

std::string Path() {
  const char* source = std::getenv("CINNABAR_SOURCE_DIR");
  return absl::StrCat(source == nullptr ? "." : source, "/models/cinnabar-tiny");
}

std::unique_ptr<ModelDirectory> Directory() {
  auto models = ModelDirectory::Load(
      {{.path = Path(), .name = "b", .aliases = {"bee", "bea"}}, {.path = Path(), .name = "a"}});
  CINNABAR_CHECK(models.ok()) << models.status().ToString();
  return *std::move(models);
}

v1::WorkerStatus Worker(const std::string& model, const std::string& fingerprint,
                        bool draining = false) {
  v1::WorkerStatus status;
  status.set_model(model);
  status.set_model_fingerprint(fingerprint);
  status.set_draining(draining);
  *status.mutable_traits() = ToWire(TinyModel().traits);
  return status;
}

TEST(ModelDirectoryTest, NothingIsServedBeforeAWorkerIsSeen) {
  const auto models = Directory();
  const auto entry = models->Find("b");
  ASSERT_TRUE(entry.ok());
  EXPECT_EQ(entry->model, nullptr);
  EXPECT_EQ(entry->num_workers, 0);
  EXPECT_THAT(models->List(), IsEmpty());
  EXPECT_FALSE(models->AllServed());
  EXPECT_EQ(models->Find("c").status().code(), absl::StatusCode::kNotFound);
}

TEST(ModelDirectoryTest, ModelsAreFoundByNameAndAlias) {
  const auto models = Directory();
  models->Update({Worker("b", "1"), Worker("b", "1"), Worker("stranger", "1")});
  for (const char* name : {"b", "bee", "bea"}) {
    const auto entry = models->Find(name);
    ASSERT_TRUE(entry.ok() && entry->model != nullptr) << name;
    EXPECT_EQ(entry->model->name, "b");
    EXPECT_EQ(entry->num_workers, 2);
    EXPECT_EQ(entry->model->traits.positions_max, TinyModel().traits.positions_max);
  }
  EXPECT_EQ(models->List().size(), 1U);
  EXPECT_FALSE(models->AllServed());
  models->Update({Worker("b", "1"), Worker("a", "1")});
  EXPECT_TRUE(models->AllServed());
  ASSERT_EQ(models->List().size(), 2U);
  EXPECT_EQ(models->List()[0].model->name, "b");  // as configured
}

TEST(ModelDirectoryTest, AModelWithoutWorkersStaysKnown) {
  const auto models = Directory();
  models->Update({Worker("b", "1")});
  models->Update({});
  const auto entry = models->Find("b");
  ASSERT_TRUE(entry.ok() && entry->model != nullptr);
  EXPECT_EQ(entry->num_workers, 0);
  EXPECT_EQ(models->List().size(), 1U);
}

TEST(ModelDirectoryTest, DrainingWorkersDoNotCount) {
  const auto models = Directory();
  models->Update({Worker("b", "1", /*draining=*/true)});
  EXPECT_EQ(models->Find("b")->num_workers, 0);
  EXPECT_NE(models->Find("b")->model, nullptr);
  // Nor do they keep the old weights in front of the new ones.
  models->Update({Worker("b", "1", true), Worker("b", "1", true), Worker("b", "2")});
  EXPECT_EQ(models->Find("b")->model->fingerprint, "2");
  EXPECT_EQ(models->Find("b")->num_workers, 1);
}

TEST(ModelDirectoryTest, TheWeightsOfMostWorkersAreServed) {
  const auto models = Directory();
  models->Update({Worker("b", "2"), Worker("b", "1"), Worker("b", "2")});
  EXPECT_EQ(models->Find("b")->model->fingerprint, "2");
  models->Update({Worker("b", "2"), Worker("b", "1")});  // a tie: the lower one
  EXPECT_EQ(models->Find("b")->model->fingerprint, "1");
  // A request keeps the model that it began with.
  const auto held = models->Find("b")->model;
  models->Update({Worker("b", "3")});
  EXPECT_EQ(held->fingerprint, "1");
  EXPECT_EQ(models->Find("b")->model->fingerprint, "3");
}

// An older worker says nothing of them, which is not the id 0.
TEST(ModelTraitsWireTest, EditTokensTravelAndMayBeAbsent) {
  ModelTraits traits = TinyModel().traits;
  EXPECT_FALSE(ToWire(traits).has_delete_token());
  EXPECT_EQ(FromWire(ToWire(traits))->delete_token, -1);
  EXPECT_EQ(FromWire(ToWire(traits))->split_token, -1);
  traits.delete_token = 0;
  traits.split_token = 6;
  EXPECT_EQ(FromWire(ToWire(traits))->delete_token, 0);
  EXPECT_EQ(FromWire(ToWire(traits))->split_token, 6);
}

TEST(ModelDirectoryTest, WhatIsNotUnderstoodIsNotServed) {
  const auto models = Directory();
  v1::WorkerStatus strange = Worker("b", "1");
  // A kind of network that only a newer gateway knows.
  strange.mutable_traits()->set_parameterization(
      static_cast<v1::ModelTraits::Parameterization>(99));
  models->Update({strange});
  const auto entry = models->Find("b");
  ASSERT_TRUE(entry.ok());
  EXPECT_EQ(entry->num_workers, 0);
}

TEST(ModelDirectoryTest, WrongConfigurationsNameWhatIsWrong) {
  auto twice = ModelDirectory::Load(
      {{.path = Path(), .name = "a"}, {.path = Path(), .name = "b", .aliases = {"a"}}});
  EXPECT_EQ(twice.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(twice.status().message()), HasSubstr("\"a\""));
  const auto missing = ModelDirectory::Load({{.path = "/no/such/folder", .name = "a"}});
  EXPECT_THAT(missing.status().ToString(), HasSubstr("/no/such/folder"));
}

}  // namespace
}  // namespace cinnabar
