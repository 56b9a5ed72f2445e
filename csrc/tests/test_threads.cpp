// Unit tests of what runs in threads, for the thread sanitizer (`make test-engine`): several callers at once,
// each with the pool's threads beside it, and forks of the process.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../pvcp/batch.h"
#include "../pvcp/threads.h"
#include "../pvcp/turns.h"

using namespace catmllm;

namespace {

// A slab of n atoms as models write it, in many spellings: operations, quotes, comments, oxidation states,
// mistakes.
std::string answer(int i) {
    std::string text = i % 3 ? "Here it is:\n```cif\n" : "";
    text += "data_x\n_cell_length_a " + std::to_string(5 + i % 7) +
            ".5\n_cell_length_b 6.1(2)\n_cell_length_c 15\n";
    text +=
        "_cell_angle_alpha 90\n_cell_angle_beta 90\n_cell_angle_gamma " + std::to_string(90 + i % 31) + "\n";
    if (i % 4 == 0) text += "_space_group_IT_number " + std::to_string(1 + i % 230) + "\n";
    if (i % 4 == 1) text += "loop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\n'-x, -y, z+1/2'\n";
    if (i % 5 == 0) text += "loop_\n_atom_type_symbol\n_atom_type_oxidation_number\nPt0+ 0\nO2- -2\n";
    text +=
        "loop_\n_atom_site_type_symbol\n_atom_site_label\n_atom_site_fract_x\n_atom_site_fract_y\n"
        "_atom_site_fract_z\n_atom_site_occupancy\n";
    for (int k = 0; k < 20 + i % 50; ++k)
        text += (k % 3 ? "Pt Pt" : "O O") + std::to_string(k) + " 0." + std::to_string(1 + 37 * k % 97) +
                " 0." + std::to_string(1 + 53 * k % 89) + " 0." + std::to_string(1 + k) +
                (i % 11 ? " 1\n" : "\n");
    return text + (i % 3 ? "```\nDone." : "");
}

bool same(const std::vector<double>& a, const std::vector<double>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), 8 * a.size()) == 0;
}

std::vector<double> scores(const std::vector<std::string>& answers, unsigned threads) {
    pvcp::Batch batch;
    batch.targets.resize(1);
    batch.targets[0].entries.push_back({78, 13});
    for (const std::string& text : answers) {
        pvcp::TextRef ref;
        ref.data = text.data();
        ref.size = text.size();
        batch.texts.push_back(ref);
    }
    std::vector<double> rows(answers.size() * pvcp::kScoreColumns);
    batch.run(rows.data(), threads);
    return rows;
}

std::atomic<int> wrong{0};

void jobs() {
    for (int round = 0; round < 200; ++round) {
        std::atomic<int> next{0};
        std::atomic<int> done{0};
        pvcp::run_together(3, [&] {
            while (next.fetch_add(1) < 50) done.fetch_add(1);
        });
        wrong += done != 50;
    }
}

void batches() {
    std::vector<std::string> answers;
    for (int i = 0; i < 200; ++i) answers.push_back(answer(i));
    const std::vector<double> alone = scores(answers, 1);
    for (unsigned threads = 2; threads < 5; ++threads) wrong += !same(scores(answers, threads), alone);
    for (const std::string& text : answers) {
        pvcp::TextRef ref;
        ref.data = text.data();
        ref.size = text.size();
        wrong += pvcp::may_hold_turns(ref);
    }
}

template <class Work>
void by_four(Work work) {
    std::vector<std::thread> callers;
    for (int c = 0; c < 4; ++c) callers.emplace_back(work);
    for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main() {
    by_four(batches);  // first: nothing of the engine's has been made yet
    by_four(jobs);
    const pid_t child = fork();  // with threads in the pool, which the child has not got
    if (child == 0) {
        batches();
        _exit(wrong != 0);
    }
    int status = -1;
    waitpid(child, &status, 0);
    wrong += status != 0;
    std::printf("threads: %d failures\n", wrong.load());
    return wrong != 0;
}
