#include "tests/support/queue_state.h"

#include <algorithm>
#include <map>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

void Print(const RedisReply& reply, std::string& out) {
  switch (reply.kind) {
    case RedisReply::Kind::kNil:
      absl::StrAppend(&out, "nil ");
      break;
    case RedisReply::Kind::kInteger:
      absl::StrAppend(&out, reply.integer, " ");
      break;
    case RedisReply::Kind::kString:
    case RedisReply::Kind::kStatus:
    case RedisReply::Kind::kError:
      absl::StrAppend(&out, "'", reply.text, "' ");
      break;
    case RedisReply::Kind::kArray:
      absl::StrAppend(&out, "[");
      for (const RedisReply& element : reply.elements) Print(element, out);
      absl::StrAppend(&out, "] ");
      break;
  }
}

absl::StatusOr<std::vector<std::string>> Keys(RedisClient& redis, const std::string& prefix) {
  CINNABAR_ASSIGN_OR_RETURN(const RedisReply reply,
                            redis.Command({"KEYS", absl::StrCat(prefix, "*")}));
  std::vector<std::string> keys;
  for (const RedisReply& each : reply.elements) keys.push_back(each.text);
  std::sort(keys.begin(), keys.end());
  return keys;
}

std::map<std::string, std::string> Pairs(const RedisReply& reply) {
  std::map<std::string, std::string> pairs;
  for (size_t i = 0; i + 1 < reply.elements.size(); i += 2)
    pairs[reply.elements[i].text] = reply.elements[i + 1].text;
  return pairs;
}

int64_t Number(const std::map<std::string, std::string>& hash, const std::string& name) {
  const auto found = hash.find(name);
  int64_t value = 0;
  if (found != hash.end()) (void)absl::SimpleAtoi(found->second, &value);
  return value;
}

}  // namespace

absl::StatusOr<std::string> DumpKeys(RedisClient& redis, const std::string& prefix) {
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<std::string> keys, Keys(redis, prefix));
  std::string out;
  for (const std::string& key : keys) {
    CINNABAR_ASSIGN_OR_RETURN(const RedisReply type, redis.Command({"TYPE", key}));
    const std::string& kind = type.text;
    std::vector<absl::string_view> command = {"GET", key};
    if (kind == "hash") command = {"HGETALL", key};
    if (kind == "set") command = {"SORT", key, "ALPHA"};
    if (kind == "stream") command = {"XRANGE", key, "-", "+"};
    if (kind == "zset") command = {"ZRANGE", key, "0", "-1", "WITHSCORES"};
    if (absl::EndsWith(key, ":lease") || absl::EndsWith(key, ":workers")) command.pop_back();
    CINNABAR_ASSIGN_OR_RETURN(RedisReply value, redis.Command(command));
    if (kind == "hash") {  // fields in a fixed order
      std::string sorted;
      for (const auto& [field, text] : Pairs(value))
        absl::StrAppend(&sorted, field, "=", text, " ");
      value = {.kind = RedisReply::Kind::kString, .text = sorted};
    }
    absl::StrAppend(&out, key.substr(prefix.size()), " ");
    Print(value, out);
    out += "\n";
  }
  return out;
}

absl::StatusOr<std::vector<std::string>> CheckQueueState(RedisClient& redis,
                                                         const std::string& prefix) {
  std::vector<std::string> wrong;
  const auto complain = [&](const auto&... words) { wrong.push_back(absl::StrCat(words...)); };
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<std::string> keys, Keys(redis, prefix));
  const std::set<std::string> all(keys.begin(), keys.end());
  const auto exists = [&](const std::string& name) { return all.contains(prefix + name); };

  std::map<std::string, std::map<std::string, std::string>> records, batches;
  std::map<std::string, std::set<std::string>> queues;  // class:tenant -> ids
  std::set<std::string> deadlines, leases, ready;
  std::map<std::string, int> ledger, dead;
  for (const std::string& key : keys) {
    absl::string_view name = key;
    (void)absl::ConsumePrefix(&name, prefix);
    if (absl::ConsumePrefix(&name, "r:")) {
      CINNABAR_ASSIGN_OR_RETURN(const RedisReply reply, redis.Command({"HGETALL", key}));
      records[std::string(name)] = Pairs(reply);
    } else if (absl::ConsumePrefix(&name, "b:")) {
      CINNABAR_ASSIGN_OR_RETURN(const RedisReply reply, redis.Command({"HGETALL", key}));
      batches[std::string(name)] = Pairs(reply);
    } else if (absl::ConsumePrefix(&name, "q:") || name == "dl" || name == "lease") {
      CINNABAR_ASSIGN_OR_RETURN(const RedisReply reply, redis.Command({"ZRANGE", key, "0", "-1"}));
      std::set<std::string>& into = name == "dl"      ? deadlines
                                    : name == "lease" ? leases
                                                      : queues[std::string(name)];
      for (const RedisReply& each : reply.elements) into.insert(each.text);
    } else if (name == "ledger" || name == "dlq" || absl::StartsWith(name, "ready:")) {
      CINNABAR_ASSIGN_OR_RETURN(const RedisReply reply, redis.Command({"XRANGE", key, "-", "+"}));
      for (const RedisReply& entry : reply.elements) {
        const auto fields = Pairs(entry.elements[1]);
        if (name == "ledger")
          ++ledger[fields.at("rid") + "=" + fields.at("st")], ++ledger[fields.at("rid")];
        if (name == "dlq") ++dead[fields.at("rid")];
        if (absl::StartsWith(name, "ready:")) ready.insert(fields.at("bid"));
      }
    }
  }

  std::map<std::string, std::map<std::string, int64_t>> tenants;
  int64_t live_requests = 0;
  int64_t live_cost = 0;
  for (const auto& [id, record] : records) {
    const auto field = [&, &record = record](const std::string& name) {
      const auto found = record.find(name);
      return found == record.end() ? std::string() : found->second;
    };
    const std::string st = field("st");
    const bool live = st == "queued" || st == "leased" || st == "running";
    const std::string bid = field("bid");
    int64_t step = Number(record, "stp");
    if (st == "running" && batches.contains(bid) && batches[bid].contains(id)) {
      // "<attempt> <step> ...": of a running request, its batch knows more.
      const std::vector<std::string> row = absl::StrSplit(batches[bid][id], ' ');
      if (row.size() < 2 || !absl::SimpleAtoi(row[1], &step)) complain(id, " runs without a row");
    }
    const bool in_queue = queues[field("cl") + ":" + field("tn")].contains(id);
    const bool in_batch = batches.contains(bid) && batches[bid].contains(id);
    if (in_queue != (st == "queued"))
      complain(id, " is ", st, in_queue ? " and in its queue" : " and not in its queue");
    if (in_batch != (st == "leased" || st == "running"))
      complain(id, " is ", st, in_batch ? " and in" : " and not in", " batch ", bid);
    if (in_batch && !leases.contains(bid)) complain("batch ", bid, " has no lease");
    if (st == "queued" && (!bid.empty() || !field("own").empty()))
      complain(id, " is queued and has an owner");
    if (st == "running" && batches[bid]["@w"] != field("own"))
      complain(id, " runs, but its batch has another owner");
    if (deadlines.contains(id) != live) complain(id, " is ", st, " and its deadline is wrong");
    if (exists("pl:" + id) != live) complain(id, " is ", st, " and its payload is wrong");
    if (!live && exists("cv:" + id)) complain(id, " is ", st, " and keeps a canvas");
    if (ledger[id] != (live ? 0 : 1))
      complain(id, " is ", st, " with ", ledger[id], " ledger entries");
    if (!live && ledger[id + "=" + st] != 1) complain(id, " is ", st, " but not in the ledger");
    if ((dead[id] == 1) != (st == "failed"))
      complain(id, " is ", st, " with ", dead[id], " dead letters");
    CINNABAR_ASSIGN_OR_RETURN(const RedisReply events,
                              redis.Command({"XRANGE", prefix + "ev:" + id, "-", "+"}));
    const size_t want = static_cast<size_t>(step) + (live ? 0 : 1);
    if (events.elements.size() != want)
      complain(id, " has ", events.elements.size(), " events at step ", step);
    for (size_t i = 0; i < events.elements.size(); ++i) {
      const std::string kind = Pairs(events.elements[i].elements[1])["k"];
      if (events.elements[i].elements[0].text != absl::StrCat(i + 1, "-1"))
        complain(id, " has a gap before event ", i + 1);
      if (kind != (i < static_cast<size_t>(step) ? "p" : st))
        complain(id, " is ", st, ", event ", i + 1, " is ", kind);
    }
    if (step > Number(record, "steps")) complain(id, " is beyond its steps");
    if (live) {
      ++live_requests;
      live_cost += Number(record, "cost");
      tenants[field("tn")]["n"] += 1;
      tenants[field("tn")]["rsv"] += Number(record, "cost");
      tenants[field("tn")]["bud"] += Number(record, "pin") + Number(record, "pout");
    }
  }
  for (const auto& [queue, ids] : queues) {
    for (const std::string& id : ids) {
      if (!records.contains(id)) complain(queue, " holds ", id, " which has no record");
    }
  }
  for (const auto& [bid, batch] : batches) {
    if (batch.size() < 4) complain("batch ", bid, " is empty");
    if (batch.at("@w").empty() != ready.contains(bid))
      complain("batch ", bid, " and the ready stream disagree");
    for (const auto& [id, row] : batch) {
      if (id[0] == '@') continue;
      if (records[id]["bid"] != bid || records[id]["att"] != row.substr(0, row.find(' ')))
        complain("batch ", bid, " holds ", id, " wrongly");
    }
  }
  for (const std::string& bid : leases) {
    if (!batches.contains(bid)) complain("a lease for no batch ", bid);
  }
  for (const std::string& key : keys) {
    if (!absl::StartsWith(key, prefix + "lim:")) continue;
    CINNABAR_ASSIGN_OR_RETURN(const RedisReply reply, redis.Command({"HGETALL", key}));
    const auto limits = Pairs(reply);
    for (const std::string name : {"n", "rsv", "bud"}) {
      const int64_t want = tenants[key.substr(prefix.size() + 4)][name];
      if (Number(limits, name) != want)
        complain(key, " ", name, " is ", Number(limits, name), ", not ", want);
    }
  }
  CINNABAR_ASSIGN_OR_RETURN(const RedisReply total, redis.Command({"HGETALL", prefix + "tot"}));
  if (Number(Pairs(total), "n") != live_requests)
    complain("tot n is ", Number(Pairs(total), "n"), ", not ", live_requests);
  if (Number(Pairs(total), "rsv") != live_cost)
    complain("tot rsv is ", Number(Pairs(total), "rsv"), ", not ", live_cost);
  return wrong;
}

}  // namespace cinnabar
