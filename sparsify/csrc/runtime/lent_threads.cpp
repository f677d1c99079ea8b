#include "runtime/lent_threads.h"

namespace sparsify {
namespace {

thread_local const Lender *current = nullptr;

}  // namespace

const Lender *lender() { return current; }

Lending::Lending(const Lender &to) : before_(current) { current = &to; }

Lending::~Lending() { current = before_; }

}  // namespace sparsify
