// A message's text as DOM nodes: fenced code apart, everything else as it is. Never as HTML.

export function render(target, text) {
  const parts = text.split(/^```[\w+#.-]*[ \t]*(?:\n|$)/m);
  target.replaceChildren(
    ...parts.flatMap((part, index) => {
      if (index % 2 === 0) {
        // Blank lines beside code would only add to its margins.
        const shown = part.replace(index > 0 ? /^\n+/ : "", "").replace(index < parts.length - 1 ? /\n+$/ : "", "");
        return shown ? [document.createTextNode(shown)] : [];
      }
      const pre = document.createElement("pre");
      pre.tabIndex = 0;
      pre.textContent = part.replace(/\n$/, "");
      return [pre];
    }),
  );
}
