// Between the products of a decoding step, in AVX2.
#define HCX_STEP_BODY
#include "step.h"

namespace hcx {
const StepSet kStepAvx2 = kStep;
}
