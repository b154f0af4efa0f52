function render({ model, el }) {
  el.innerHTML = `<label class="app-drop"><input type="file" multiple accept="image/*,.tif,.tiff" aria-label="Choose images">
    <span><b>Drop images of blood smears here</b>, or click to choose some</span></label>`;
  const zone = el.querySelector("label"), words = el.querySelector("span"), invitation = words.innerHTML;
  const page = document.body.dataset.voila ? document : el;
  async function send(files) {
    const all = [...(files || [])];
    zone.classList.remove("app-over");
    for (const [index, file] of all.entries()) {
      words.textContent = `Reading ${file.name}${all.length > 1 ? ` (${index + 1} of ${all.length})` : ""} …`;
      const content = file.size > LIMIT * 1e6 ? [] : [await file.arrayBuffer()];
      model.send({ name: file.name, size: file.size, index: index, count: all.length }, undefined, content);
    }
  }
  const over = event => { event.preventDefault(); zone.classList.add("app-over"); };
  const leave = event => { if (!event.relatedTarget) zone.classList.remove("app-over"); };
  const drop = event => { event.preventDefault(); send(event.dataTransfer.files); };
  const paste = event => send(event.clipboardData.files);
  const events = { dragover: over, dragleave: leave, drop: drop, paste: paste };
  for (const [name, act] of Object.entries(events)) page.addEventListener(name, act);
  el.querySelector("input").addEventListener("change", event => { send(event.target.files); event.target.value = ""; });
  model.on("msg:custom", () => { words.innerHTML = invitation; });
  return () => { for (const [name, act] of Object.entries(events)) page.removeEventListener(name, act); };
}
export default { render };
