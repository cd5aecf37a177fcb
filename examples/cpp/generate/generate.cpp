// Greedy decoding by LibTorch alone, of a model written by dijiang.export_decode:
//
//   generate dijiang_ops.so model.pt2 20 504 3575 282    # 20 new token ids after these three
#include <dlfcn.h>

#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

int main(int argc, char** argv) try {
  if (argc < 5) {
    std::fprintf(stderr, "usage: %s dijiang_ops.so model.pt2 NEW_TOKENS ID...\n", argv[0]);
    return 2;
  }
  // The model looks the operators up when it is loaded.
  if (!dlopen(argv[1], RTLD_NOW)) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader start(argv[2], "start"), step(argv[2], "model");

  std::vector<int64_t> ids;
  for (int i = 4; i < argc; ++i) ids.push_back(std::stoll(argv[i]));
  const size_t prompt = ids.size(), total = prompt + std::stoul(argv[3]);

  // The token, then the state, which every step writes in place.
  std::vector<at::Tensor> inputs = start.run({});
  inputs.insert(inputs.begin(), at::empty({1, 1}, at::kLong));
  for (size_t read = 0; ids.size() < total; ++read) {
    inputs[0].fill_(ids[read]);
    const at::Tensor logits = step.run(inputs)[0];
    if (read + 1 == ids.size()) ids.push_back(logits.argmax().item<int64_t>());
  }
  for (size_t i = prompt; i < total; ++i) std::printf("%lld\n", static_cast<long long>(ids[i]));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
