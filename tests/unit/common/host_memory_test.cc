#include "common/base/host_memory.h"

#include <gtest/gtest.h>

namespace cinnabar {
namespace {

constexpr char kMeminfo[] =
    "MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:    9000 kB\n";

TEST(HostMemoryTest, WithoutAGroupItIsTheMachines) {
  const HostMemory memory = ParseHostMemory({.meminfo = kMeminfo, .cgroup_max = "max\n"});
  EXPECT_EQ(memory.total_bytes, 16000 << 10);
  EXPECT_EQ(memory.free_bytes, 9000 << 10);
}

TEST(HostMemoryTest, AGroupsLimitCountsWithoutItsFilePages) {
  const HostMemory memory =
      ParseHostMemory({.meminfo = kMeminfo,
                       .cgroup_max = "4096000\n",
                       .cgroup_current = "3000000\n",
                       .cgroup_stat = "anon 900000\nfile 2000000\nshmem 0\n"});
  EXPECT_EQ(memory.total_bytes, 4096000);
  EXPECT_EQ(memory.free_bytes, 3096000);  // 1,000,000 are in use
}

TEST(HostMemoryTest, TheSmallerOneHolds) {
  const HostMemory memory =
      ParseHostMemory({.meminfo = kMeminfo, .cgroup_max = "1000000000000", .cgroup_current = "5"});
  EXPECT_EQ(memory.total_bytes, 16000 << 10);
  EXPECT_EQ(memory.free_bytes, 9000 << 10);
  const HostMemory full = ParseHostMemory(
      {.meminfo = kMeminfo, .cgroup_max = "1000", .cgroup_current = "5000", .cgroup_stat = ""});
  EXPECT_EQ(full.free_bytes, 0);
}

TEST(HostMemoryTest, WhatCannotBeReadIsNotKnown) {
  EXPECT_EQ(ParseHostMemory({}).total_bytes, -1);
  EXPECT_EQ(ParseHostMemory({.meminfo = "MemTotal:\nMemAvailable: x kB\n"}).free_bytes, -1);
  EXPECT_EQ(ParseHostMemory({.cgroup_max = "4096"}).total_bytes, 4096);
}

TEST(HostMemoryTest, ThisMachineHasSome) {
  const HostMemory memory = ReadHostMemory();
  EXPECT_GT(memory.total_bytes, 0);
  EXPECT_GT(memory.free_bytes, 0);
  EXPECT_LE(memory.free_bytes, memory.total_bytes);
}

}  // namespace
}  // namespace cinnabar
