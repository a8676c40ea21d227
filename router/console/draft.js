// The policy that is being written: it stays in this tab while other pages are looked at.

const KEY = "causeway.draft";

export const draft = {
  text: () => sessionStorage.getItem(KEY),
  keep: (text) => sessionStorage.setItem(KEY, text),
  drop: () => sessionStorage.removeItem(KEY),
};

// The policy with this goal in place of the one it has.
export function withGoal(source, goal) {
  const lines = source.split("\n");
  const begin = lines.findIndex((line) => /^goal\s*:/.test(line));
  if (begin >= 0) {
    const rest = lines.slice(begin + 1).findIndex((line) => /^[^\s#]/.test(line));
    lines.splice(begin, rest < 0 ? lines.length : rest + 1);
  }
  return `${lines.join("\n").trimEnd()}\n\ngoal:\n  ${goal}\n`;
}
