#include <cstdio>
#include <cstdlib>
#include <cstring>
#include "tests/sim/scheduler/policies.h"
using namespace cinnabar; using namespace cinnabar::sim;
static void Print(const Outcome& o) {
  std::printf("%-14s %5.2fx n=%ld intime=%.4f/s %.4f useful=%.3f ref=%ld expW=%ld expR=%ld | wait int %.2f/%.2f/%.2f max %.1f std p99 %.1f max %.1f bat p99 %.1f max %.1f | cls %.3f %.3f %.3f | pad %.3f disc %.3f | jain %.4f/%.4f worstT %.3f cell %.3f size %.3f | dec %ld %.1fus wmax %ld\n",
    o.policy.c_str(), o.load, o.num_requests, o.goodput_per_second, o.goodput_share, o.useful_share, o.refused, o.expired_waiting, o.expired_running,
    o.wait[0].p50,o.wait[0].p95,o.wait[0].p99,o.wait[0].max,o.wait[1].p99,o.wait[1].max,o.wait[2].p99,o.wait[2].max,o.in_time_share[0],o.in_time_share[1],o.in_time_share[2],o.padding_waste,o.discarded_waste,o.jain,o.jain_requests,o.worst_tenant,o.worst_cell,o.worst_size,o.decisions,o.decide_seconds*1e6,o.waiting_max); fflush(stdout);
}
int main(int argc,char**argv){
  auto rows=ReadFixture(argv[1]); if(!rows.ok()){puts(rows.status().ToString().c_str());return 1;}
  bool oracle=argc>2&&strstr(argv[2],"o"); bool eq=argc>2&&strstr(argv[2],"e");
  ClusterModel cluster;
  for(double load:(getenv("L")?std::vector<double>{atof(getenv("L"))}:std::vector<double>{0.5,1.0,1.5,3.0})){
    WorkloadOptions wo; wo.load=load; if(eq) wo.equal_tenants=8;
    Workload w=MakeWorkload("code",*rows,cluster,wo);
    if(load==0.5) printf("span %.1f scale %.3f n %zu\n",w.span_seconds,w.time_scale,w.requests.size());
    auto run=[&](std::unique_ptr<Policy> p){Outcome o=Simulate(w,cluster,*p,{}); Print(o); return o;};
    if(!getenv("ONLY")){run(MakeFcfsPolicy()); run(MakeBucketedFcfsPolicy());}
    if(oracle){ for(auto&v:OracleVariants()){printf("%d pad%.2f sh%.1f prot%d dr%d ",(int)v.order,v.padding_max,v.tokens_share,v.protect_running,v.drain); run(MakeOraclePolicy(w,cluster,v));} }
    else if(!getenv("ONLY")) run(MakeOraclePolicy(w,cluster,{}));
    run(MakePlannerPolicy()); if(getenv("B")) printf("bound %.4f/s\n",RelaxedBound(w,cluster)/w.span_seconds);
  }
}
